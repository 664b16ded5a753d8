"""TrainEngine: one optimizer step of the global batch, through DeepSpeed, on any number of ranks.

The gradient of a step is the sum over the model's objectives of that of the mean loss of all predictions of the GLOBAL
batch, however it is cut into ranks x micro-batches x accumulation. Shapes: models/spec.py, sparse/linear.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from dsbert.base.collectives import all_reduce
from dsbert.base.own_time import OwnClock
from dsbert.cluster.process_group import World
from dsbert.config.lr_schedule import learning_rate
from dsbert.config.recipe import Recipe
from dsbert.config.sparsity_keys import named_as_in_recipes
from dsbert.data.stream import Batch
from dsbert.engine.ds_config import load_ds_config, precision, zero_stage
from dsbert.engine.ds_engine import initialize
from dsbert.engine.layout_proof import prove_layout
from dsbert.engine.micro_batches import MicroBatch, counts_of, cut
from dsbert.engine.replay import GradientReplay
from dsbert.engine.shard_editor import ShardEditor
from dsbert.engine.step_guard import StepGuard
from dsbert.engine.step_message import tell_all
from dsbert.engine.step_result import StepResult
from dsbert.engine.zero_shards import (
    ParamShard,
    forward_copies,
    inner_optimizer,
    loss_scale,
    loss_scale_can_fall,
    loss_scaler,
    param_shard,
    set_loss_scaler,
)
from dsbert.models.device_batch import DeviceBatch, any_batch
from dsbert.models.spec import model_spec
from dsbert.sparse import BlockSparseLinear
from dsbert.sparse.flat_blocks import PRUNE_SCORES
from dsbert.sparse.group_lasso import shrink_factors, shrink_slice_
from dsbert.sparse.kernel_plan import KernelPlan, plan_kernels
from dsbert.sparse.kernels.record import KernelRecord

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


class TrainEngine(ShardEditor):
    """Wraps the model in DeepSpeed. Also a BlockEditor: the mask manager's hands on DeepSpeed's shards.

    recipe: with the micro-batch that this many ranks have.

    Raises UserError for a precision that the device lacks, a DeepSpeed configuration that cannot be used, or more ranks
    than samples.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        layers: dict[str, BlockSparseLinear],
        world: World,
        run_dir: Path | None = None,
    ) -> None:
        recipe = recipe.model_copy(update={"batch": recipe.batch.on_ranks(world.world_size)})
        self.recipe, self.layers = recipe, layers
        self._spec = model_spec(recipe.model)
        self.objectives = self._spec.objectives
        self.step = 0
        self.on_progress: Callable[[], object] = lambda: None  # called before every micro-batch
        self.own_clock = OwnClock()  # whoever waits for data says so to it
        micro_batch = recipe.batch.micro_batch
        self.accumulation_steps = -(-recipe.batch.global_batch // (micro_batch * world.world_size))
        config = self.ds_config = load_ds_config(recipe, world.world_size, self.accumulation_steps, run_dir)
        self.zero_stage, self.precision = zero_stage(config), precision(config)
        super().__init__(initialize(recipe, model, config, world), world)
        # Names as in the model; DeepSpeed keeps the parameter objects.
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        scaled = self.precision == "fp16"
        self._guard = StepGuard(self._engine, self.parameters.values(), world, scaled=scaled)
        self._replay = GradientReplay(self._engine, self.parameters, layers, self._guard, world, recipe.batch)
        self._samples: Callable[[int, int], Batch]
        self.kernels: KernelPlan
        self.plan_kernels(None)

    @property
    def deepspeed_engine(self) -> Any:
        return self._engine

    def prove_layout(self) -> None:
        """See that shards, copies and gradients are where dsbert takes them to be, before the first step.

        Leaves no trace. Collective. Raises UserError on every rank for a configuration that dsbert cannot follow.
        """
        on_cpu = self.world.device.type == "cpu"
        # Compiled kernels may be made for a shape: on a GPU the one that training has.
        rows, length = (1, 8) if on_cpu else (self.recipe.batch.micro_batch, self.recipe.data.seq_len)
        batch = any_batch(rows, min(length, self.recipe.data.seq_len), self.world.device)
        prove_layout(self._engine, self.parameters, self._guard, batch, self.world, self.ds_config)

    def replay_gradients(self, every_steps: int, samples: Callable[[int, int], Batch]) -> None:
        """Have a gradient computed twice every so many steps (0: never), as replay.py says; all ranks alike. samples:
        batches by first position and count, as `SampleStream.batch`: those that train_step is given for its step."""
        self._replay.every_steps, self._samples = every_steps, samples

    def plan_kernels(self, stored: KernelRecord | None) -> None:
        """Choose the sparse layers' kernels, for all ranks alike; `stored`: a checkpoint's record, to go on with.
        Collective. Raises UserError on every rank if the recipe asks for kernels that cannot run."""
        tokens = self.recipe.batch.micro_batch * self.recipe.data.seq_len
        with named_as_in_recipes(on_all_ranks=True):
            self.kernels = plan_kernels(self.layers, tokens=tokens, dtype=_DTYPES[self.precision], stored=stored)

    def plan(self) -> list[MicroBatch]:
        """This rank's micro-batches of a step; empty ones where others have more."""
        mine = cut(self.recipe.batch, self.world.rank, self.world.world_size)
        return mine + [MicroBatch(mine[0].first, 0)] * (self.accumulation_steps - len(mine))

    def train_step(self, batches: list[Batch], *, stop: bool = False, busy: bool = False) -> StepResult:
        """One optimizer step on this rank's part of a global batch (one Batch per entry of `plan()`). Collective.

        stop: this rank wants the run to stop; busy: its checkpoint writer is at work. Whether any rank says so, the
        same answer on all ranks, is in the result. If a loss or a
        gradient of any rank is not finite, the step counts but moves nothing anywhere: `skipped` in the result.
        Raises PeerError on every rank, before anything has moved, where a rank computes wrongly (replay.py).
        """
        ready = [DeviceBatch.of(batch, self.world.device) for batch in batches]
        counts, computed = counts_of(batches, self.objectives), self._computed(ready)
        message = tell_all(counts, computed, self.own_clock, stop=stop, busy=busy)
        # DeepSpeed averages over ranks and micro-batches; the mean wanted is over the global batch's counts.
        parts = self.world.world_size * self.accumulation_steps
        scale = cache(lambda: self._on_device([parts / max(count, 1) for count in message().counts]))
        losses = torch.zeros(len(self.objectives), dtype=torch.float64, device=self.world.device)
        self._engine.train()
        with self.own_clock.phase("compute"):
            self._replay.begin(self.step + 1, lambda micro: self._loss_again(micro, scale))
            for index, (micro, batch) in enumerate(zip(self.plan(), ready, strict=True)):
                if index:
                    self._engine.step()  # between micro-batches it only counts
                self._reseed(micro)
                self.on_progress()
                micro_losses, _ = self._engine(batch)
                losses += micro_losses.detach()
                self._engine.backward((micro_losses * scale()).sum())
                self._replay.own_pass_done()
        self._replay.compare()
        lr = self._set_lr(self.step + 1)
        verdict = self._guard.verdict(losses)
        skipped_steps, can_fall = self._engine.skipped_steps, loss_scale_can_fall(self._engine)
        if verdict.finite:
            self._finish_step(lr)
        else:
            self._guard.skip()
        self.step += 1
        skipped = self._engine.skipped_steps > skipped_steps
        return StepResult(
            verdict.losses,
            **vars(message()),
            grad_norm=verdict.grad_norm,
            lr=lr,
            skipped=skipped,
            rescaled=skipped and can_fall and bool(verdict.losses.isfinite().all()),
            nonfinite_ranks=verdict.nonfinite_ranks,
        )

    @torch.no_grad()
    def evaluate_batch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(losses, hits) of this rank's batch: see models/spec.py. At ZeRO stage 3 collective."""
        self._engine.eval()
        found: tuple[Tensor, Tensor] = self._engine(DeviceBatch.of(batch, self.world.device))
        return found

    def learning_rate(self, step: int) -> float:
        """Rate of optimizer step `step` = 1..total_steps, by optim.schedule."""
        return learning_rate(self.recipe.optim, self.recipe.peak_lr, step)

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

    def nonfinite_parameters(self) -> list[str]:
        """Parameters of which this rank holds a weight, a moment or a copy for forward that is not finite."""
        found = []
        for name, shard in self.shards().items():
            copies = (tensor for tensor, _ in forward_copies(self.parameters[name]))
            if not all(bool(tensor.isfinite().all()) for tensor in (shard.master, *shard.moments.values(), *copies)):
                found.append(name)
        return found

    def counters(self) -> dict[str, Any]:
        """DeepSpeed's own counters and loss scaler, for a checkpoint at an accumulation boundary."""
        return {name: getattr(self._engine, name) for name in _COUNTERS} | {"loss_scaler": loss_scaler(self._engine)}

    def restore_counters(self, counters: dict[str, Any]) -> None:
        """Set what `counters` returned; the accumulation may be another one now."""
        for name in _COUNTERS:
            setattr(self._engine, name, counters[name])
        self._engine.micro_steps = self.step * self.accumulation_steps
        set_loss_scaler(self._engine, counters["loss_scaler"])

    def loss_scale(self) -> float:
        """What losses are multiplied by; 1 unless fp16."""
        return loss_scale(self._engine)

    # Parts of a step

    def _computed(self, batches: list[DeviceBatch]) -> list[int]:
        """[positions, pairs] of this rank's micro-batches: see StepResult."""
        lengths = np.concatenate([batch.starts.diff().numpy() for batch in batches])
        positions = sum(batch.num_tokens for batch in batches)
        return [positions, self._spec.attention_pairs(self.recipe.model, lengths)]

    def _loss_again(self, micro: MicroBatch, scale: Callable[[], Tensor]) -> Tensor:
        """Of any micro-batch of the step in hand, outside of DeepSpeed's accounts."""
        first = self.step * self.recipe.batch.global_batch + micro.first
        batch = DeviceBatch.of(self._samples(first, micro.count), self.world.device)
        self._reseed(micro)
        self.on_progress()
        losses: Tensor = self._engine.module(batch)[0]
        return (losses * scale()).sum()

    def _on_device(self, values: list[float]) -> Tensor:
        """A tensor of them. On its way to a card it does not wait for what the card has to do, as it else would."""
        own = torch.tensor(values)
        return own.pin_memory().to(self.world.device, non_blocking=True) if self.world.device.type == "cuda" else own

    def _reseed(self, micro: MicroBatch) -> None:
        """Dropout depends on (seed, step, first sample) alone: there is no generator state to save."""
        text = f"{self.recipe.seed}\0dropout\0{self.step}\0{micro.first}"
        torch.manual_seed(xxhash.xxh3_64_intdigest(text.encode()) % 2**63)

    def _set_lr(self, step: int) -> float:
        lr = self.learning_rate(step)
        for group in inner_optimizer(self._engine).param_groups:
            group["lr"] = lr
        return lr

    def _finish_step(self, lr: float) -> None:
        """Group Lasso and optimizer at the accumulation boundary."""
        if self.recipe.sparsity.group_lasso and self.layers:
            self._shrink(lr)
        self._engine.step()

    def _shrink(self, lr: float) -> None:
        """Decoupled Group Lasso on the master weights, before the optimizer moves them: like AdamW's decay, it acts on
        the weights of the step before, and DeepSpeed's own copy-out then reaches every copy. One all-reduce."""
        score = PRUNE_SCORES["l2"]
        parts = [self.block_scores(layer, score) for layer in self.layers.values()]
        squares = all_reduce(torch.cat(parts)).double() / score.scale
        for (name, layer), square in zip(self.layers.items(), squares.split([p.numel() for p in parts]), strict=True):
            factors = shrink_factors(
                square,
                strength=self.recipe.sparsity.group_lasso,
                weight_std=self._spec.initial_std(f"{name}.blocks", self.recipe.model),
                block_size=layer.block_size,
                lr=lr,
            )
            shard = param_shard(self._engine, layer.blocks)
            shrink_slice_(shard.master, shard.offset, layer.block_size**2, factors)
