"""Proof at start that what zero_shards reads and writes is what DeepSpeed trains, whatever its configuration.

DeepSpeed's layout is private, its options move it, and a mistake would not show: checkpoints and mask updates would
hold other weights than training. So before the first step one step of DeepSpeed's is taken with known numbers in every
element: gradients that the optimizer must be given beside the masters that they belong to, and masters that forward
must read on every rank; then what a load writes must be what forward reads. The optimizer is held still and every bit
put back: nothing of it remains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dsbert.base.collectives import gather_json
from dsbert.base.errors import DsbertError, UserError
from dsbert.cluster.process_group import World, peer_failures
from dsbert.engine.step_guard import StepGuard
from dsbert.engine.zero_shards import (
    ParamShard,
    flat_masters,
    forward_copies,
    full_shape,
    inner_optimizer,
    loss_scale,
    loss_scaler,
    param_shard,
    release_gathered,
    set_loss_scaler,
)

_GRADIENTS, _MASTERS, _COPIES = range(3)  # no piece of one looks like one of another
_PERIOD = 65521  # prime: no shape repeats with it
# Gradients are summed in half precisions; what is out of place, or of another size, is off by much more.
_TOLERANCE = 0.05
_COUNTERS = ("micro_steps", "global_steps", "global_samples", "skipped_steps")
# Keys of the shipped configurations, and those that dsbert sets itself.
_PLAIN_KEYS = {
    "zero_optimization.stage", "bf16.enabled", "fp16.enabled", "fp16.loss_scale", "gradient_clipping",
    "steps_per_print", "gradient_accumulation_steps", "train_batch_size", "train_micro_batch_size_per_gpu",
}  # fmt: skip


def prove_layout(
    engine: Any, parameters: dict[str, nn.Parameter], guard: StepGuard, batch: Any, world: World, config: dict[str, Any]
) -> None:
    """Before the first step. batch: anything that the model takes; engine and config: DeepSpeed's.

    Collective. Raises UserError on every rank, naming parameter, rank and the configuration's keys, if a number is not
    where it should be.
    """
    probe = _Probe(engine, parameters, guard, world)
    try:
        with peer_failures(world):
            probe.run(batch)
    except (DsbertError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # DeepSpeed's own, of any type, where options do not go together
        probe.note(f"{type(error).__name__}: {' '.join(str(error).split())}")
    # The one that was found first: what is displaced on one rank shows on others later.
    found = sorted([when, rank, what] for rank, own in enumerate(gather_json(probe.found[:1])) for when, what in own)
    if found:
        _, rank, what = found[0]
        keys = [f"{key} = {value!r}" for key, value in _leaves(config) if key not in _PLAIN_KEYS]
        raise UserError(
            f"expected DeepSpeed to train the weights that dsbert saves, found on rank {rank}: {what}: one of these "
            f"keys of the DeepSpeed configuration has to go: {', '.join(keys) or 'none is unusual'}"
        ).for_all()


class _Probe:
    """found: what is wrong on this rank, each with the number of the look that found it."""

    def __init__(self, engine: Any, parameters: dict[str, nn.Parameter], guard: StepGuard, world: World) -> None:
        self.found: list[tuple[int, str]] = []
        self._look = 0
        self._engine, self._parameters, self._guard, self._world = engine, parameters, guard, world
        self._names = {id(param): name for name, param in parameters.items()}
        self._starts = {name: 7919 * 3 * number for number, name in enumerate(parameters)}
        # Odd multiples of 1/256: exact in every precision, and none is zero.
        table = torch.randint(-64, 64, (_PERIOD,), generator=torch.Generator().manual_seed(1))
        self._table = ((2 * table + 1).float() / 256).to(world.device)
        self._parts = min(2, engine.gradient_accumulation_steps())  # micro-batches of the step
        self._factor = 1.0  # what the optimizer's gradients should be, by the pattern
        self._stepping = False
        self._met: set[str] = set()
        self._by_storage: dict[int, dict[str, ParamShard]] = {}

    def note(self, what: str) -> None:
        """Something is wrong."""
        self.found.append((self._look, what))

    def run(self, batch: Any) -> None:
        """Take the step, look, and put everything back."""
        devices = [self._world.device] if self._world.device.type == "cuda" else []
        hold = inner_optimizer(self._engine).register_step_pre_hook(self._check_gradients)
        with torch.random.fork_rng(devices), self._uncounted():
            try:
                self._backward(batch)
                self._check_norm()
                release_gathered(self._engine)
                held = self._held()
                try:
                    self._step()
                    self._check_forward(batch, _MASTERS, "the optimizer's weights do not come back as forward's")
                    for name, param in self._parameters.items():
                        _fill((tensor, self._pattern(name, _COPIES, offset, tensor.numel()))
                              for tensor, offset in forward_copies(param))  # fmt: skip
                    self._check_forward(batch, _COPIES, "what a load writes is not what forward reads")
                finally:
                    release_gathered(self._engine)
                    for name, param in self._parameters.items():
                        _fill(zip(_tensors(self._engine, param), held[name], strict=True))
            finally:
                hold.remove()

    def _backward(self, batch: Any) -> None:
        """The last micro-batches of a step, with known gradients."""

        def known(name: str, gradient: Tensor) -> Tensor:
            return self._pattern(name, _GRADIENTS, 0, gradient.numel()).view(gradient.shape).to(gradient.dtype)

        handles = [
            param.register_hook(lambda gradient, name=name: known(name, gradient))
            for name, param in self._parameters.items()
        ]
        self._engine.train()
        self._engine.micro_steps = self._engine.gradient_accumulation_steps() - self._parts
        for part in range(self._parts):
            if part:
                self._engine.step()
            losses, _ = self._engine(batch)
            self._engine.backward(losses.sum())
        for handle in handles:
            handle.remove()

    def _check_norm(self) -> None:
        """What the step guard reads is the gradient that the optimizer will be given."""
        squares = torch.cat([self._table.new_zeros(1), self._table]).double().square().cumsum(0).cpu()
        total = 0.0
        for name, param in self._parameters.items():
            start, numel = self._starts[name] % _PERIOD, full_shape(param).numel()
            periods, rest = divmod(start + numel, _PERIOD)
            total += periods * float(squares[-1]) + float(squares[rest]) - float(squares[start])
        norm = self._parts * math.sqrt(total) / loss_scale(self._engine)
        found = self._guard.verdict(torch.zeros(2, dtype=torch.float64, device=self._world.device)).grad_norm
        if not abs(found - norm) <= _TOLERANCE * norm:
            self.note(f"a gradient norm of {found:.4g} where {norm:.4g} is right")
        clipping = self._engine.gradient_clipping()
        self._factor = self._parts / loss_scale(self._engine) * (min(1.0, clipping / norm) if clipping > 0 else 1.0)

    @torch.no_grad()
    def _step(self) -> None:
        for name, param in self._parameters.items():
            shard = param_shard(self._engine, param)
            if shard.master.dtype != torch.float32:
                self.note(f"{name}: master weights in {shard.master.dtype}")
            shard.master.copy_(self._pattern(name, _MASTERS, shard.offset, shard.numel))
            if shard.numel:
                self._by_storage.setdefault(shard.master.untyped_storage().data_ptr(), {})[name] = shard
        self._stepping = True
        self._engine.step()
        for name in (name for shards in self._by_storage.values() for name in shards):
            if name not in self._met:
                self.note(f"{name}: the optimizer is given no gradient for what dsbert takes for its weights")

    @torch.no_grad()
    def _check_gradients(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Before the optimizer steps, which it then does not: without a gradient torch's leave everything alone."""
        owners = {id(tensor) for tensor in flat_masters(self._engine)}
        for flat in [param for group in optimizer.param_groups for param in group["params"]]:
            gradient, flat.grad = flat.grad, None
            if not self._stepping:
                self.note("the optimizer steps between the micro-batches of a step")
            if gradient is None:
                continue
            if id(flat) not in owners and flat.numel():
                self.note("the optimizer holds weights that dsbert does not know")
            for name, shard in self._by_storage.get(flat.untyped_storage().data_ptr(), {}).items():
                start = shard.master.storage_offset() - flat.storage_offset()
                if start < 0 or start + shard.numel > flat.numel():
                    continue  # of another tensor in the same memory
                own = gradient.view(-1)[start : start + shard.numel]
                expected = self._factor * self._pattern(name, _GRADIENTS, shard.offset, shard.numel)
                if not torch.allclose(own.float(), expected, _TOLERANCE, 0.0):
                    self.note(f"{name}: the optimizer is given another gradient than backward has made")
                self._met.add(name)

    @torch.no_grad()
    def _check_forward(self, batch: Any, kind: int, message: str) -> None:
        """What stands in each parameter while the model computes, gathered where DeepSpeed gathers it."""
        seen = set()
        self._look = kind

        def look(module: nn.Module, args: Any) -> None:
            for param in module.parameters(recurse=False):
                name = self._names[id(param)]
                seen.add(name)
                expected = self._pattern(name, kind, 0, full_shape(param).numel()).to(param.dtype)
                if not torch.equal(param.data.view(-1), expected):
                    self.note(f"{name}: {message}")

        handles = [module.register_forward_pre_hook(look) for module in self._engine.module.modules()]
        self._engine.eval()
        self._engine(batch)
        for handle in handles:
            handle.remove()
        for name in self._parameters:
            if name not in seen:
                self.note(f"{name}: forward does not use it")

    def _held(self) -> dict[str, list[Tensor]]:
        return {
            name: [tensor.clone() for tensor in _tensors(self._engine, param)]
            for name, param in self._parameters.items()
        }

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        """DeepSpeed counts and reports steps, and asks the optimizer for moments; this is no step."""
        engine, state = self._engine, inner_optimizer(self._engine).state
        known = {id(flat) for flat in state}
        counters, scaler = {name: getattr(engine, name) for name in _COUNTERS}, loss_scaler(engine)
        reports, engine.monitor.enabled = engine.monitor.enabled, False
        try:
            yield
        finally:
            engine.monitor.enabled = reports
            for name, value in counters.items():
                setattr(engine, name, value)
            set_loss_scaler(engine, scaler)
            for flat in [flat for flat in state if id(flat) not in known]:
                del state[flat]

    def _pattern(self, name: str, kind: int, offset: int, numel: int) -> Tensor:
        """Elements [offset, offset + numel) of the known numbers of a parameter: fp32 [numel]."""
        start = (self._starts[name] + 7919 * kind + offset) % _PERIOD
        return self._table.repeat(-(-(start + numel) // _PERIOD))[start : start + numel]


def _tensors(engine: Any, param: nn.Parameter) -> list[Tensor]:
    """All that this rank holds of a parameter and that a step changes."""
    return [param_shard(engine, param).master, *(tensor for tensor, _ in forward_copies(param))]


@torch.no_grad()
def _fill(pairs: Any) -> None:
    for tensor, values in pairs:
        tensor.copy_(values)


def _leaves(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
