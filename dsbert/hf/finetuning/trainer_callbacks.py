"""What happens in transformers' Trainer beside its own: mask updates, checkpoints that are known to be whole, signals
that ask for a save, lines about each epoch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dsbert.base.collectives import gather_json
from dsbert.base.durable import replace_durably
from dsbert.base.errors import UserError
from dsbert.base.jsonl import parse_object, to_json
from dsbert.cluster.signals import StopRequest
from dsbert.sparse import BlockSparseLinear, MaskManager, SparsityConfig, TorchBlockEditor

_MASKS = "masks.safetensors"
_WHOLE = "whole.json"  # written last into a checkpoint


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint of Trainer's in `folder` that was written to its end."""
    found = {}
    for path in folder.glob("checkpoint-*/" + _WHOLE):
        record = parse_object(path.read_bytes()) or {}
        if isinstance(record.get("step"), int):
            found[record["step"]] = path.parent
    return found[max(found)] if found else None


class MaskUpdates(TrainerCallback):  # type: ignore[misc]  # transformers' types are not followed
    """Has the mask manager move the pattern after each optimizer step, as in pre-training; and puts what it knows
    beyond the model's coordinates into every checkpoint."""

    def __init__(
        self, layers: dict[str, BlockSparseLinear], config: SparsityConfig, seed: int, resumed: Path | None
    ) -> None:
        self._layers, self._config, self._seed, self._resumed = layers, config, seed, resumed
        self.manager: MaskManager | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raises UserError for a schedule that the steps do not allow."""
        optimizer = kwargs["optimizer"]
        try:
            self.manager = MaskManager(
                self._layers, self._config, total_steps=state.max_steps, seed=self._seed,
                editor=TorchBlockEditor(getattr(optimizer, "optimizer", optimizer)),
            )  # fmt: skip
        except ValueError as error:
            raise UserError(f"{error}: set sparsity.num_updates, or train for more steps").for_all() from None
        if self._resumed is not None:
            self.manager.load_state_dict(load_file(self._resumed / _MASKS), step=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.manager is not None
        self.manager.maybe_update(state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.manager is not None
        self.manager.verify_replicas()
        if state.is_world_process_zero:
            tensors: dict[str, Tensor] = {name: x.contiguous() for name, x in self.manager.state_dict().items()}
            save_file(tensors, _checkpoint(args, state) / _MASKS)


class WholeCheckpoints(TrainerCallback):  # type: ignore[misc]  # as above
    """Marks a checkpoint when every rank has written its part: it stands behind all others that write into one."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        gather_json(None)
        if state.is_world_process_zero:
            replace_durably(_checkpoint(args, state) / _WHOLE, to_json({"step": state.global_step}).encode())


class StopOnSignals(TrainerCallback):  # type: ignore[misc]  # as above
    """Has all ranks save and leave after the same step when one of them was asked to."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop
        self.stopped = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step < state.max_steps and self._stop.agreed():
            self.stopped = control.should_save = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.stopped:  # which Trainer takes for the end of the epoch
            control.should_evaluate = control.should_save = False


class ProgressLines(TrainerCallback):  # type: ignore[misc]  # as above
    """A line on standard error per logged step and per evaluation."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            _say(state, f"loss {float(logs['loss']):.4f}")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            hidden = ("epoch", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
            found = {name.removeprefix("eval_"): value for name, value in (metrics or {}).items()}
            parts = [f"{name} {value:.4f}" for name, value in found.items() if name not in hidden]
            _say(state, f"validation {', '.join(parts)}")


def _say(state: TrainerState, words: str) -> None:
    print(
        f"dsbert: step {state.global_step} of {state.max_steps}, epoch {state.epoch or 0:.2f}: {words}", file=sys.stderr
    )


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
