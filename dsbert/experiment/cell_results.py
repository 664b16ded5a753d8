"""What a cell's run has come to, out of its run directory, or out of the small record that is kept of it.

FLOPs are the paper's (forward and backward of encoder linears and attention), from the first step on. Seconds are those
of steps: evaluations and saves are taken out.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsbert.base.durable import replace_durably
from dsbert.base.errors import UserError
from dsbert.base.jsonl import JsonlFile
from dsbert.base.records import read_record
from dsbert.training.attempts import Status
from dsbert.training.history import read_config


@dataclass(frozen=True)
class Measurement:
    """An evaluation on held-out text. loss: MLM, nats per masked token. flops_dense: what a dense model would take."""

    step: int
    tokens: int
    flops: int
    flops_dense: int
    seconds: float
    loss: float
    accuracy: float


@dataclass(frozen=True)
class MaskStep:
    """After a mask update: explored degrees of freedom, and the share of the pruned blocks that were new."""

    step: int
    dof: float
    removed_new_ratio: float


@dataclass(frozen=True)
class CellResult:
    """A run that was trained to its end. identity: of the cell; versions, revision: of what trained it."""

    name: str
    identity: dict[str, Any]
    measurements: tuple[Measurement, ...]
    masks: tuple[MaskStep, ...]
    density: float
    versions: dict[str, str | None]
    revision: str | None

    @property
    def last(self) -> Measurement:
        return self.measurements[-1]

    @property
    def loss(self) -> float:
        """Held-out MLM loss at the last step."""
        return self.last.loss

    @property
    def half_step(self) -> int:
        """The first evaluation at which half of the way from the first measured loss to the lowest is behind: when the
        loss leaves its plateau, which differs more between seeds than where it ends."""
        lowest = min(one.loss for one in self.measurements)
        middle = (self.measurements[0].loss + lowest) / 2
        return next(one.step for one in self.measurements if one.loss <= middle)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> CellResult:
        return cls(
            **{
                **values,
                "measurements": tuple(Measurement(**one) for one in values["measurements"]),
                "masks": tuple(MaskStep(**one) for one in values["masks"]),
            }
        )


def read_result(run_dir: Path, name: str, identity: dict[str, Any]) -> CellResult | None:
    """Of a run that is done; None of any other."""
    if outcome(run_dir) != "done":
        return None
    config = read_config(run_dir)
    measurements, masks = [], []
    seconds, before, density = 0.0, 0, 1.0
    for record in JsonlFile(run_dir / "metrics.jsonl").read():
        seconds += record["step_s"] * (record["step"] - before)
        before, density = record["step"], record["density"]
        if record["val_mlm_loss"] is not None:
            measurements.append(_measurement(record, seconds))
        if record["removed_new_ratio"] is not None:
            masks.append(MaskStep(record["step"], record["dof"], record["removed_new_ratio"]))
    if not measurements or measurements[-1].step != before:
        raise UserError(f"expected an evaluation at the last step in {run_dir}/metrics.jsonl, found none")
    return CellResult(
        name, identity, tuple(measurements), tuple(masks), density, config["versions"], config["git_revision"]
    )


def _measurement(record: dict[str, Any], seconds: float) -> Measurement:
    return Measurement(
        step=record["step"],
        tokens=record["tokens_total"],
        flops=record["flops_total"],
        flops_dense=record["flops_dense_total"],
        seconds=round(seconds, 3),
        loss=record["val_mlm_loss"],
        accuracy=record["val_mlm_accuracy"],
    )


def outcome(run_dir: Path) -> str | None:
    """done | requeue | failed, as status.json has it; None of a run that goes on, was killed, or has not begun."""
    with suppress(OSError, ValueError):
        return read_record(run_dir / "status.json", Status).outcome
    return None


def load_records(path: Path) -> dict[str, CellResult]:
    """Results by cell, as `save_records` wrote them; none where there is no file. Raises UserError."""
    if not path.exists():
        return {}
    try:
        found = [CellResult.from_json(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"expected a result per line in {path}, found: {error}") from None
    return {one.name: one for one in found}


def save_records(path: Path, results: dict[str, CellResult]) -> None:
    """A line per cell, by name: so that a repository can keep what a directory of runs has shown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(results[name].to_json(), sort_keys=True) for name in sorted(results)]
    replace_durably(path, "".join(f"{line}\n" for line in lines).encode())
