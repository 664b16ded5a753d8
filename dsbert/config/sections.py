"""The sections of a recipe, each field with its range; but for `sparsity`, which the sparse library owns."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from dsbert.base.errors import UserError
from dsbert.base.fields import Flag, Number, PathName, Section, Text, Whole, whole
from dsbert.config.architectures import ARCHITECTURES
from dsbert.config.complaints import in_one_line

Positive = Field(gt=0)


class ModelConfig(Section):
    """The encoder, and its shape. intermediate_size defaults to 4 x hidden, num_heads to hidden / 64 (paper: head size
    64).

    activation_checkpointing: backward computes each layer again, which needs less memory and gives the same bits.
    """

    added_later = ("architecture", "activation_checkpointing")

    architecture: Text = "bert"
    num_layers: Whole = Positive
    hidden_size: Whole = Positive
    num_heads: Whole = Positive
    intermediate_size: Whole = Positive
    max_positions: Whole = Field(512, gt=0)
    dropout: Number = Field(0.1, ge=0, lt=1)
    initializer_std: Number = Field(0.02, gt=0)
    activation_checkpointing: Flag = False

    @field_validator("architecture")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in ARCHITECTURES:
            raise ValueError(f"expected one of {', '.join(ARCHITECTURES)}, found {name!r}")
        return name

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, values: Any) -> Any:
        hidden = values.get("hidden_size") if isinstance(values, dict) else None
        if hidden is not None:
            fits = isinstance(hidden, int | float) and hidden > 0 and hidden % 1 == 0
            hidden = int(hidden) if fits else 64  # where it does not fit, that is said, and not that these are missing
            values = {"num_heads": max(1, hidden // 64), "intermediate_size": 4 * hidden} | values
        return values

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"expected num_heads that divides hidden_size {self.hidden_size}, found {self.num_heads}")
        return self


class DataConfig(Section):
    """path: a directory that `dsbert prepare` has made. seq_len in tokens.

    shuffle_window: 0 shuffles the samples of an epoch over the whole of it. So many samples (1,024 or more): chunks
    in random order, and samples inside windows of that size, for storage on which random reads are slow. stage_to: a
    directory on each node's own disk that the data is copied to, once, and read from.
    """

    path: PathName
    seq_len: Whole = Field(128, ge=8)
    nsp: Flag = True
    mask_fraction: Number = Field(0.15, gt=0, lt=1)
    shuffle_window: Annotated[Literal[0] | Annotated[int, Field(ge=1024)], BeforeValidator(whole)] = 0
    stage_to: PathName | None = None


class BatchConfig(Section):
    """global_batch: sequences per optimizer step over all ranks. micro_batch: per forward on one rank, at most."""

    global_batch: Whole = Positive
    micro_batch: Whole = Positive

    def on_ranks(self, world_size: int) -> BatchConfig:
        """With micro_batch lowered, where there are fewer micro-batches than ranks, until every rank has samples.
        Raises UserError for more ranks than samples."""
        if world_size > self.global_batch:
            raise UserError(
                f"expected batch.global_batch of at least one sample for each of {world_size} ranks, found "
                f"{self.global_batch}: start at most {self.global_batch} ranks, or give batch.global_batch={world_size}"
            )
        share = -(-self.global_batch // world_size)
        return self.model_copy(update={"micro_batch": min(self.micro_batch, share)})


# Of a run, where `optim.schedule` is wsd and no optim.decay_steps are given.
_DECAY_SHARE = 0.1


def _steps_of_shares(values: Any) -> Any:
    """With warmup_steps and decay_steps that are shares of the run, between 0 and 1, as numbers of steps."""
    total = values.get("total_steps") if isinstance(values, dict) else None
    if isinstance(total, bool) or not isinstance(total, int | float) or not 1 <= total < 2**63:
        return values
    shares = {key: values.get(key) for key in ("warmup_steps", "decay_steps")}
    steps = {key: round(share * total) for key, share in shares.items() if isinstance(share, float) and 0 < share < 1}
    return values | steps


class OptimConfig(Section):
    """AdamW with linear warm-up, and then by `schedule`: "linear" or "cosine" decay to 0, or "wsd" (warm-up, stable,
    decay), which stays at the peak until the last decay_steps and falls linearly in these (None: a tenth of the run).

    warmup_steps, decay_steps: a number of steps, or a share of the run between 0 and 1.
    Give `lr`, or `dense_lr`: the best rate of the dense model, which `lr_rule` scales to the density d: eq. 3 of the
    paper, 1/d, or 1/sqrt(d).
    max_skipped_steps: a step whose loss or gradient is not finite is skipped; after so many in a row the run stops.
    """

    added_later = ("lr_rule", "schedule", "decay_steps")

    total_steps: Whole = Positive
    warmup_steps: Whole = Field(ge=0)
    lr: Number | None = Field(None, gt=0)
    dense_lr: Number | None = Field(None, gt=0)
    weight_decay: Number = Field(0.01, ge=0)
    beta1: Number = Field(0.9, ge=0, lt=1)
    beta2: Number = Field(0.999, ge=0, lt=1)
    eps: Number = Field(1e-6, gt=0)
    max_skipped_steps: Whole = Field(10, gt=0)
    lr_rule: Literal["eq3", "inverse", "inverse_sqrt"] = "eq3"
    schedule: Literal["linear", "cosine", "wsd"] = "linear"
    decay_steps: Whole | None = Field(None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _count_steps(cls, values: Any) -> Any:
        return _steps_of_shares(values)

    @model_validator(mode="after")
    def _one_rate(self) -> OptimConfig:
        found = []
        if (self.lr is None) == (self.dense_lr is None):
            given = "neither" if self.lr is None else "both: override the other one with null"
            found.append(f"expected exactly one of lr and dense_lr, found {given}")
        if self.warmup_steps >= self.total_steps:
            found.append(f"expected warmup_steps below total_steps {self.total_steps}, found {self.warmup_steps}")
        if self.decay_steps is not None and self.schedule != "wsd":
            found.append(f"expected decay_steps with schedule wsd alone, found schedule {self.schedule}")
        elif self.schedule == "wsd" and self.num_decay_steps > self.total_steps - self.warmup_steps:
            most = self.total_steps - self.warmup_steps
            found.append(
                f"expected decay_steps of at most the {most} steps after warm-up, found {self.num_decay_steps}"
            )
        if found:
            raise ValueError(in_one_line(found))
        return self

    @property
    def num_decay_steps(self) -> int:
        """Over which the rate falls at the end of a run by wsd."""
        return self.decay_steps or max(1, round(_DECAY_SHARE * self.total_steps))


class EvalConfig(Section):
    """Validation during training: `sequences` held-out samples, the same ones each time (0 = off)."""

    every_steps: Whole = Positive
    sequences: Whole = Field(512, ge=0)


class CheckpointConfig(Section):
    """keep: how many of the newest checkpoints stay; keep_every_steps: and those of every so many steps, for ever.

    max_mb_per_s: how fast each rank writes in the background, to leave a shared file system to others (None: as fast as
    it can). A save that somebody waits for knows no limit.
    """

    every_steps: Whole = Positive
    keep: Whole = Field(2, gt=0)
    keep_every_steps: Whole | None = Field(None, gt=0)
    max_mb_per_s: Number | None = Field(None, gt=0)


class LogConfig(Section):
    """A record in metrics.jsonl (and W&B) every_steps; steps with an update or an evaluation are always logged.
    lines_every_s: seconds between two lines for people, where standard error is no terminal.

    wandb_group: what W&B shows runs together by; wandb_name: of the run there, by default that of its directory.
    wandb_artifacts: W&B lists the checkpoints, by where they are; nothing of them is sent. tensorboard: also write
    RUN/tensorboard.
    """

    added_later = ("lines_every_s", "wandb_group", "wandb_name", "wandb_artifacts", "tensorboard")

    every_steps: Whole = Field(10, gt=0)
    lines_every_s: Number = Field(60.0, gt=0)
    wandb: Flag = True
    wandb_project: Text = "dsbert"
    wandb_group: Text | None = None
    wandb_name: Text | None = None
    wandb_artifacts: Flag = False
    tensorboard: Flag = False


class HealthConfig(Section):
    """replay_every_steps: how often each rank also computes a gradient of another's, whose bits must be the same; 0:
    never."""

    replay_every_steps: Whole = Field(200, ge=0)


class DeepSpeedConfig(Section):
    """config: a name in ds_configs/, the path of a JSON file, or what such a file holds. overrides: merged over it."""

    config: Text | dict[str, Any] = "zero1_bf16"
    overrides: dict[str, Any] = Field(default_factory=dict)
