"""`dsbert.Run`: a run for notebooks and scripts. Nothing of dsbert imports this; each method loads what it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsbert.base.errors import UserError
from dsbert.monitoring.run_files import since
from dsbert.monitoring.run_status import RunStatus, read_run
from dsbert.monitoring.step_records import StepLog, read_columns

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from dsbert.reports.drawing import Picture
    from dsbert.sparse import BlockTopology

# By what `Run.plot` calls them: the title in a report.
_PLOTS = {
    "loss": "Loss over the run",
    "rates": "Learning rate and gradient norm",
    "speed": "Speed",
    "cost": "Loss and what it cost",
    "attempts": "Time line",
}
_BLOCK_PLOTS = ("blocks", "churn", "explored", "norms", "ages")


class Run:
    """A run directory of `dsbert pretrain`, also while it is at work: every call reads what is there by then.

    path: as text or as a Path. Raises UserError where there is no run.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._log = StepLog(self.path)
        self.status()

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def status(self) -> RunStatus:
        """State, step, time left, losses, speed and what was lost, as `dsbert status` has them; seconds, tokens a
        second of all ranks, FLOP/s. A later call reads of metrics.jsonl only what is new."""
        return read_run(self.path, self._log)[1]

    def metrics(self) -> Any:
        """A row for each line of metrics.jsonl that counts, oldest first: a pandas DataFrame, or without pandas a list
        of dicts. Columns are its fields that are numbers: step (int64), time (seconds since 1970), loss and loss_mlm
        (nats a masked token), tokens_per_s, step_s, ...; float64, and NaN where a line has none."""
        columns: dict[str, Any] = dict(read_columns(self.path, *since(read_run(self.path, self._log)[0].attempt)))
        return _table(
            {key: [int(value) for value in columns[key]] if key == "step" else columns[key] for key in columns}
        )

    def updates(self) -> Any:
        """What each mask update did to each sparse weight, a row each: a pandas DataFrame, or without pandas a list of
        dicts. Columns: step, update (its number), weight, churn, removed_new_ratio, explored (shares), empty_rows,
        empty_cols (block rows and columns without a block), and the norms of blocks: <group>_<statistic> with the
        groups kept, dropped and new (those that the update before had put there) and mean, p10, p50, p90; NaN in
        journals of before.

        Raises UserError before the first checkpoint, or where masks.jsonl does not lead to the newest one.
        """
        updates, _, histories = self._topology_history()
        rows = [
            {"step": update.step, "update": update.update, "weight": name}
            | {key: getattr(one, key)[number] for key in ("churn", "removed_new_ratio", "explored")}
            | {key: getattr(one, key)[number] for key in ("empty_rows", "empty_cols")}
            | {key: values[number] for key, values in one.norms.items()}
            for number, update in enumerate(updates)
            for name, one in histories.items()
        ]
        return _table({key: [row[key] for row in rows] for key in rows[0]} if rows else {})

    def checkpoints(self) -> list[dict[str, Any]]:
        """Oldest first, with those that were moved aside: name, step, created (seconds since 1970), bytes, world,
        status and more, as `dsbert checkpoints --json` has them. They are not read through: `verified` is None."""
        from dsbert.inspection.summary import list_checkpoints

        found: list[dict[str, Any]] = list_checkpoints(self.path, quick=True)["checkpoints"]
        return found

    def model(self, checkpoint: int | str | Path | None = None) -> Any:
        """The model that transformers has for it, such as BertForPreTraining, on the CPU in fp32 and in evaluation
        mode: sparse weights are dense [out, in] matrices in it, zero where no block stands (but for a low-rank term).

        checkpoint: a step, a name such as step_00001000, or a path; by default the newest that verifies. Raises
        UserError where there is none of that name, CheckpointError where it is damaged.
        """
        from dsbert.checkpoint.restore import restore_model
        from dsbert.hf.export_forms import transformers_model

        return transformers_model(restore_model(self._checkpoint(checkpoint))).eval()

    def tokenizer(self, checkpoint: int | str | Path | None = None) -> Tokenizer:
        """The tokenizer of a checkpoint, as of `model`: `tokenizer.encode(text).ids` begin with [CLS] and end with
        [SEP]."""
        from dsbert.checkpoint.restore import restore_tokenizer

        return restore_tokenizer(self._checkpoint(checkpoint))

    def topology(self, step: int | None = None) -> dict[str, BlockTopology]:
        """Where the blocks of each sparse weight stood after `step` steps and the update that follows that step, by
        default now: `rows` and `cols` (int32 tensors [K], in slots), `density`, `block_size`, `shape` (out, in), and
        `mask()`, a boolean tensor [R, C] over the grid of blocks.

        Raises UserError for a step that was not taken or before the first checkpoint, CheckpointError where masks.jsonl
        does not lead there.
        """
        from dsbert.inspection.topologies import read_updates, topologies_after

        updates = read_updates(self.path)
        last = max([self.status().step, *(update.step for update in updates[-1:])])
        if step is not None and not 0 <= step <= last:
            raise UserError(f"expected a step of 0 to {last}, which the run in {self.path} has taken, found {step}")
        return topologies_after(self.path, last if step is None else step, updates)

    def plot(self, what: str = "loss", *others: Run | str | Path) -> Picture:
        """A picture as in `dsbert report`, which a notebook shows; `.save("loss.svg")` and `.figure`, matplotlib's.

        what: loss, rates, speed, cost or attempts, with other runs in the same picture; or of the blocks of this run
        where they stand (blocks), churn, explored, norms or ages. Raises UserError for another word, where there is
        nothing to draw yet, or where matplotlib is missing.
        """
        if what in _BLOCK_PLOTS:
            return self._plot_blocks(what)
        if what not in _PLOTS:
            raise UserError(f"expected one of {', '.join((*_PLOTS, *_BLOCK_PLOTS))} to plot, found {what!r}")
        from dsbert.reports.run_pictures import PICTURES, ReportedRun

        paths = [self.path, *(one.path if isinstance(one, Run) else Path(one) for one in others)]
        runs = {str(path): ReportedRun.read(path) for path in paths}
        if not any(run.files.metrics.last for run in runs.values()):
            raise UserError(f"expected steps in {', '.join(runs)}, found none yet: wait for the first")
        return PICTURES[_PLOTS[what]]({name: run for name, run in runs.items() if run.files.metrics.last})

    def _plot_blocks(self, what: str) -> Picture:
        from dsbert.reports import topology_pictures as draw

        updates, maps, histories = self._topology_history()
        if not maps or (what != "blocks" and not updates):
            raise UserError(f"expected {'mask updates' if maps else 'sparse weights'} in {self.path}, found none")
        steps = [update.step for update in updates]
        pictures: Mapping[str, Callable[[], Picture | None]] = {
            "blocks": lambda: draw.map_picture(maps),
            "churn": lambda: draw.churn_picture(steps, histories),
            "explored": lambda: draw.explored_picture(steps, histories),
            "norms": lambda: draw.norm_picture(steps, histories),
            "ages": lambda: draw.age_picture(histories),
        }
        picture = pictures[what]()
        if picture is None:
            raise UserError(
                f"expected norms of blocks in {self.path / 'masks.jsonl'}, found none: an older dsbert wrote it"
            )
        return picture

    def _topology_history(self) -> tuple[Any, Any, Any]:
        """(updates, maps, histories). Raises UserError."""
        from dsbert.inspection.topologies import any_state, read_updates
        from dsbert.reports.topology_history import layer_histories, layer_maps

        any_state(self.path)  # or there are no maps for want of a checkpoint
        updates, maps = read_updates(self.path), layer_maps(self.path)
        try:
            return updates, maps, layer_histories(updates, maps)
        except ValueError as error:
            raise UserError(f"expected a whole journal of mask updates in {self.path}, found: {error}") from None

    def _checkpoint(self, which: int | str | Path | None) -> Path:
        if which is None:
            return self.path
        from dsbert.checkpoint.loading import published, step_name

        root = self.path / "checkpoints"
        name = step_name(which) if isinstance(which, int) else which
        found = next((path for path in (root / name, Path(name)) if path.is_dir()), None)
        if found is None:
            there = ", ".join(path.name for path in published(root)) or "none"
            raise UserError(f"expected a checkpoint {name} of {self.path}, found {there}")
        return found


def _table(columns: Mapping[str, Any]) -> Any:
    """A DataFrame, or without pandas a list of dicts."""
    try:
        import pandas
    except ImportError:
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return pandas.DataFrame(dict(columns))
