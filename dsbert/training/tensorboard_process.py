"""The process that writes a run for TensorBoard, into RUN/tensorboard: follower.py starts it, and it alone imports
TensorBoard's writer.

What a start writes begins with a mark by which TensorBoard forgets what it has from there on; it stands behind the last
step that is known to be on disk, or that the run has gone back to. So each step shows once, as metrics.jsonl has it.
"""

from __future__ import annotations

import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsbert.base.durable import read_regular
from dsbert.training.record_stream import MediaReader, Say, alone, follow, run_process

_LAST = "last_step"


def main() -> int:
    """See record_stream.py."""
    return run_process(write, package="tensorboard", extra="tensorboard")


def write(options: dict[str, Any], ended: threading.Event, say: Say) -> dict[str, Any]:
    """Write what the run's records hold, and what is appended to them until `ended`.

    options: run_dir; step: which the run has gone back to; layers: as of `MediaReader`. Returns {"last": step}.
    Raises OSError where the disk refuses.
    """
    from torch.utils.tensorboard import SummaryWriter

    run_dir = Path(options["run_dir"])
    folder = run_dir / "tensorboard"
    folder.mkdir(exist_ok=True)
    media = MediaReader(run_dir, options.get("layers"), say)
    with alone(folder / "lock"):
        last = min(_last_step(folder / _LAST), options["step"])
        writer = SummaryWriter(str(folder), purge_step=last + 1)
        for records in follow(run_dir / "metrics.jsonl", ended):
            new = [record for record in records if record["step"] > last]
            for record in new:
                _add(writer, record, media)
            if new:
                last = new[-1]["step"]
                writer.flush()
                _keep(folder / _LAST, last)  # behind what it promises
        writer.close()
    return {"last": last}


def _add(writer: Any, record: dict[str, Any], media: MediaReader) -> None:
    step, when = record["step"], record.get("time")
    for key, value in record.items():
        if isinstance(value, int | float) and key not in ("step", "time"):
            writer.add_scalar(key, value, step, walltime=when)
    found = media.of(record)
    if found is None:
        return
    try:
        writer.add_image("topology/blocks", found.blocks, step, walltime=when, dataformats="HWC")
        for name, (counts, edges) in found.histograms.items():
            middles = (edges[:-1] + edges[1:]) / 2
            writer.add_histogram_raw(
                f"topology/{name}",
                min=float(edges[0]),
                max=float(edges[-1]),
                num=int(counts.sum()),
                sum=float(counts @ middles),
                sum_squares=float(counts @ middles**2),
                bucket_limits=edges[1:].tolist(),
                bucket_counts=counts.tolist(),
                global_step=step,
                walltime=when,
            )
    except Exception as error:  # without pillow, for one
        media.leave_out(error)


def _last_step(path: Path) -> int:
    with suppress(OSError, ValueError):
        return int(read_regular(path))
    return 0


def _keep(path: Path, step: int) -> None:
    fresh = path.with_name(f"{path.name}.tmp")
    fresh.write_text(f"{step}\n")
    fresh.replace(path)


if __name__ == "__main__":
    sys.exit(main())
