"""TrainEngine: one optimizer step of the global batch, through DeepSpeed, on any number of ranks.

The gradient of a step is that of the mean over all masked tokens, plus that of the mean over all NSP pairs, of the
GLOBAL batch, however it is cut into ranks x micro-batches x accumulation. Shapes: see model.py and sparse/linear.py.
"""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from dsbert.config import Recipe
from dsbert.data.stream import Batch
from dsbert.distributed import World, all_reduce
from dsbert.ds_config import load_ds_config, precision, zero_stage
from dsbert.errors import UserError
from dsbert.model import DeviceBatch, SparseBert
from dsbert.sparse import BlockSparseLinear
from dsbert.sparse.flat_blocks import PRUNE_SCORES, PruneScore, partial_scores
from dsbert.sparse.group_lasso import shrink_factors, shrink_slice_
from dsbert.zero_shards import (
    ParamShard,
    full_shape,
    inner_optimizer,
    param_shard,
    set_adam_step,
    zero_blocks,
)

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


@dataclass(frozen=True)
class MicroBatch:
    """Where a micro-batch starts in the global batch, and how many of its rows are samples (the rest are filler)."""

    first: int
    count: int


@dataclass(frozen=True, eq=False)
class StepResult:
    """Sums over the global batch. losses: [mlm, nsp] summed cross-entropies (still on the device); counts: masked
    tokens, NSP pairs; tokens: positions that are not padding; stop: some rank asked to stop."""

    losses: Tensor
    masked_tokens: int
    nsp_pairs: int
    tokens: int
    grad_norm: float
    lr: float
    stop: bool

    def mean_losses(self) -> tuple[float, float]:
        """(MLM loss per masked token, NSP loss per pair), 0 where there was none."""
        mlm, nsp = self.losses.tolist()
        return mlm / max(self.masked_tokens, 1), nsp / max(self.nsp_pairs, 1)


class TrainEngine:
    """Wraps the model in DeepSpeed. Also a BlockEditor: the mask manager's hands on DeepSpeed's shards.

    Raises UserError for a precision that the device lacks, or a DeepSpeed configuration that cannot be used.
    """

    def __init__(self, recipe: Recipe, model: SparseBert, layers: dict[str, BlockSparseLinear], world: World) -> None:
        self.recipe, self.world, self.layers = recipe, world, layers
        self.step = 0
        micro_batch = recipe.batch.micro_batch
        self.accumulation_steps = -(-recipe.batch.global_batch // (micro_batch * world.world_size))
        config = load_ds_config(recipe, world.world_size, self.accumulation_steps)
        self.zero_stage, self.precision = zero_stage(config), precision(config)
        self._engine = _initialize(recipe, model, config, world)
        # Names as in the model; DeepSpeed keeps the parameter objects.
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())

    @property
    def deepspeed_engine(self) -> Any:
        return self._engine

    def plan(self) -> list[MicroBatch]:
        """This rank's micro-batches of a step. A short rank gets filler rows, so that any world size runs any batch."""
        size, total = self.recipe.batch.micro_batch, self.recipe.batch.global_batch
        start = self.world.rank * self.accumulation_steps
        firsts = [(start + index) * size for index in range(self.accumulation_steps)]
        return [MicroBatch(min(first, total), max(0, min(size, total - first))) for first in firsts]

    def train_step(self, batches: list[Batch], *, stop: bool = False) -> StepResult:
        """One optimizer step on this rank's part of a global batch (one Batch per entry of `plan()`). Collective.

        stop: this rank wants the run to stop; the answer, the same on all ranks, is in the result.
        """
        counts = all_reduce(torch.tensor(_counts(batches, stop), dtype=torch.int64))
        masked_tokens, nsp_pairs, tokens, stops = counts.tolist()
        # DeepSpeed averages over ranks and micro-batches; the mean wanted is over the global batch's counts.
        parts = self.world.world_size * self.accumulation_steps
        scale = torch.tensor([parts / max(masked_tokens, 1), parts / max(nsp_pairs, 1)], device=self.world.device)
        losses = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        self._engine.train()
        for index, (micro, batch) in enumerate(zip(self.plan(), batches, strict=True)):
            if index:
                self._engine.step()  # between micro-batches it only counts
            self._reseed(micro)
            micro_losses, _ = self._engine(DeviceBatch.of(batch, self.world.device))
            losses += micro_losses.detach()
            self._engine.backward((micro_losses * scale).sum())
        lr = self._set_lr(self.step + 1)
        grad_norm = self._finish_step(lr)
        self.step += 1
        return StepResult(all_reduce(losses), masked_tokens, nsp_pairs, tokens, grad_norm, lr, stops > 0)

    @torch.no_grad()
    def evaluate_batch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(losses, hits) of this rank's batch: see SparseBert. At ZeRO stage 3 collective."""
        self._engine.eval()
        return self._engine(DeviceBatch.of(batch, self.world.device))

    def learning_rate(self, step: int) -> float:
        """Rate of optimizer step `step` = 1..total_steps: linear warm-up to the peak, then linear decay (paper).

        It would reach 0 one step after the last, so that no step is taken in vain.
        """
        optim = self.recipe.optim
        if step <= optim.warmup_steps:
            return self.recipe.peak_lr * step / optim.warmup_steps
        return self.recipe.peak_lr * (optim.total_steps - step + 1) / (optim.total_steps - optim.warmup_steps + 1)

    def shards(self) -> dict[str, ParamShard]:
        """What this rank answers for of every parameter, as live views: together the ranks hold each element once."""
        return {name: self.shard(name).owned(self.world.rank, self.world.world_size) for name in self.parameters}

    def shard(self, name: str) -> ParamShard:
        """All that this rank holds of a parameter's master and moments."""
        return param_shard(self._engine, self.parameters[name])

    def replica_digests(self) -> dict[str, int]:
        """64-bit digests of the weights that every rank should hold alike; {} at stage 3, which replicates none."""
        if self.zero_stage == 3:
            return {}
        return {
            name: xxhash.xxh3_64_intdigest(param.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            for name, param in self.parameters.items()
        }

    def counters(self) -> dict[str, Any]:
        """DeepSpeed's own counters and loss scaler, for a checkpoint at an accumulation boundary."""
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        numbers = (
            {name: value for name, value in vars(scaler).items() if isinstance(value, int | float)} if scaler else {}
        )
        return {name: getattr(self._engine, name) for name in _COUNTERS} | {"loss_scaler": numbers}

    def restore_counters(self, counters: dict[str, Any]) -> None:
        """Set what `counters` returned; the accumulation may be another one now."""
        for name in _COUNTERS:
            setattr(self._engine, name, counters[name])
        self._engine.micro_steps = self.step * self.accumulation_steps
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        for name, value in counters["loss_scaler"].items():
            if scaler is not None and isinstance(getattr(scaler, name, None), int | float):
                setattr(scaler, name, value)

    # BlockEditor

    @torch.no_grad()
    def block_scores(self, layer: BlockSparseLinear, score: PruneScore) -> Tensor:
        shard = param_shard(self._engine, layer.blocks).owned(self.world.rank, self.world.world_size)
        return partial_scores(shard.master, shard.offset, layer.num_active, layer.block_size**2, score)

    def zero_blocks(self, layer: BlockSparseLinear, slots: Tensor) -> None:
        zero_blocks(self._engine, layer.blocks, slots)

    def gradient_divisor(self) -> float:
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        return self.world.world_size * float(getattr(scaler, "cur_scale", 1.0))

    # Parts of a step

    def _reseed(self, micro: MicroBatch) -> None:
        """Dropout depends on (seed, step, first sample) alone: there is no generator state to save."""
        text = f"{self.recipe.seed}\0dropout\0{self.step}\0{micro.first}"
        torch.manual_seed(xxhash.xxh3_64_intdigest(text.encode()) % 2**63)

    def _set_lr(self, step: int) -> float:
        lr = self.learning_rate(step)
        for group in inner_optimizer(self._engine).param_groups:
            group["lr"] = lr
        return lr

    def _finish_step(self, lr: float) -> float:
        """Optimizer step at the accumulation boundary; returns the norm of the global gradient before clipping."""
        if self.recipe.sparsity.group_lasso and self.layers:
            self._shrink(lr)
        # DeepSpeed reports no norm for plain fp32 at stage 0, where every rank holds the averaged gradients.
        if self.zero_stage == 0 and self.precision == "fp32":
            grads = [param.grad for param in self.parameters.values() if param.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads)
            self._engine.step()
        else:
            self._engine.step()
            norm = self._engine.get_global_grad_norm()
        return float(norm)

    def _shrink(self, lr: float) -> None:
        """Decoupled Group Lasso on the master weights, before the optimizer moves them: like AdamW's decay, it acts on
        the weights of the step before, and DeepSpeed's own copy-out then reaches every copy. One all-reduce."""
        score = PRUNE_SCORES["l2"]
        parts = [self.block_scores(layer, score) for layer in self.layers.values()]
        squares = score.to_norm(all_reduce(torch.cat(parts))).square()
        for layer, square in zip(self.layers.values(), squares.split([p.numel() for p in parts]), strict=True):
            factors = shrink_factors(
                square,
                strength=self.recipe.sparsity.group_lasso,
                weight_std=self.recipe.model.initializer_std,
                block_size=layer.block_size,
                lr=lr,
            )
            shard = param_shard(self._engine, layer.blocks)
            shrink_slice_(shard.master, shard.offset, layer.block_size**2, factors)


def _counts(batches: list[Batch], stop: bool) -> list[int]:
    masked = sum(batch.mlm_labels.size for batch in batches)
    pairs = sum(int((batch.nsp_labels >= 0).sum()) for batch in batches)
    return [masked, pairs, sum(batch.num_tokens for batch in batches), int(stop)]


def _initialize(recipe: Recipe, model: SparseBert, config: dict[str, Any], world: World) -> Any:
    """deepspeed.initialize, without compiling its CPU operators and with its chatter on standard error."""
    # DeepSpeed's affair, once a rank: torch 2.13 has renamed what it calls.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*reduce_scatter_tensor.*", category=FutureWarning)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if world.device.type == "cuda" else "cpu")
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    for handler in logger.handlers:
        if getattr(handler, "stream", None) is sys.stdout:
            handler.setStream(sys.stderr)
    if world.device.type == "cpu":
        # Otherwise built on first use, for minutes, and startup fails where there is no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    chosen = precision(config)
    supported = {"fp16": get_accelerator().is_fp16_supported, "bf16": get_accelerator().is_bf16_supported}
    if chosen in supported and not supported[chosen]():
        raise UserError(
            f"expected a device that computes in {chosen} for deepspeed.config {recipe.deepspeed.config!r}, found "
            f"{world.device.type}: choose another precision, such as zero1_bf16 or zero1_fp32"
        )
    try:
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=_optimizer(recipe, model, world), config=config, dist_init_required=False
        )
    except (ValueError, AssertionError, deepspeed.DeepSpeedConfigError) as error:  # pydantic's is a ValueError
        found = " ".join(str(error).split())
        raise UserError(
            f"expected a configuration that DeepSpeed accepts in {recipe.deepspeed}, found: {found}"
        ) from None
    # FP16_UnfusedOptimizer takes a step on zero gradients when it is built, which would shift the bias correction; the
    # rate was 0, so that the weights did not move.
    if inner_optimizer(engine).state:
        set_adam_step(engine, 0)
    return engine


def _optimizer(recipe: Recipe, model: SparseBert, world: World) -> torch.optim.Optimizer:
    """AdamW without decay on biases and LayerNorm; the rate is set at every step."""
    optim = recipe.optim
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for param in model.parameters():
        (decay if len(full_shape(param)) > 1 else no_decay).append(param)
    groups: list[dict[str, Any]] = [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups,
        lr=0.0,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=True if world.device.type == "cuda" else None,
    )
