"""The one place that knows DeepSpeed's private ZeRO layout (seen in 0.19.8; tests fail loudly if a release moves it).

For every trainable parameter: the slice of the fp32 master and of the Adam moments that this rank holds, as live views,
and the copies of the parameter that forward reads. All tensors here are 1-D unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsbert.sparse.block_editor import even_share
from dsbert.sparse.flat_blocks import fill_blocks_

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class ParamShard:
    """Elements [offset, offset + numel) of a flattened parameter: views of the master weight and of its moments.

    replicated: every rank holds all of it (stage 0). moments is empty before the first optimizer step. owner: the
    tensor of the inner optimizer that this is a slice of.
    """

    offset: int
    master: Tensor
    moments: dict[str, Tensor] = field(default_factory=dict)
    replicated: bool = False
    owner: Tensor | None = None

    @property
    def numel(self) -> int:
        return self.master.numel()

    def owned(self, rank: int, world_size: int) -> ParamShard:
        """The part that this rank answers for: all of a ZeRO shard, an even share of a replicated parameter."""
        if not self.replicated:
            return self
        start, length = even_share(self.numel, rank, world_size)
        moments = {name: tensor.narrow(0, start, length) for name, tensor in self.moments.items()}
        return ParamShard(self.offset + start, self.master.narrow(0, start, length), moments, owner=self.owner)


def full_shape(param: nn.Parameter) -> torch.Size:
    """The parameter's shape, also where stage 3 has partitioned it away."""
    return torch.Size(getattr(param, "ds_shape", param.shape))


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's wrapper, whose state is alive."""
    inner: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return inner


def param_shard(engine: Any, param: Any) -> ParamShard:
    """This rank's shard of `param`; empty if it holds nothing of it."""
    outer = engine.optimizer
    state = inner_optimizer(engine).state
    if hasattr(param, "ds_id"):
        return _stage3_shard(outer, state, param)
    if hasattr(param, "_hp_mapping"):
        return _stage12_shard(outer, state, param)
    flat = _half_precision_master(outer, param)
    if flat is None:  # fp32 at stage 0: the parameter is its own master
        return ParamShard(0, param.data.view(-1), _moments(state, param, 0, param.numel()), True, param)
    tensor, start = flat
    master = tensor.data.view(-1).narrow(0, start, param.numel())
    return ParamShard(0, master, _moments(state, tensor, start, param.numel()), True, tensor)


def _stage3_shard(outer: Any, state: Any, param: Any) -> ParamShard:
    group, start, length = outer.grad_position[outer.get_param_id(param)]
    flat = outer.fp32_partitioned_groups_flat[group]
    offset = outer._get_param_partition_rank(param) * length
    length = max(0, min(length, param.ds_numel - offset))  # the last rank's partition ends in padding
    return ParamShard(offset, flat.data.narrow(0, start, length), _moments(state, flat, start, length), owner=flat)


def _stage12_shard(outer: Any, state: Any, param: Any) -> ParamShard:
    if hasattr(outer, "round_robin_bit16_groups"):
        group, start, offset, length = _stage12_place(outer, param)
        flat = outer.single_partition_of_fp32_groups[group]
    elif (mapping := param._hp_mapping) is None:
        group, start, offset, length = 0, 0, 0, 0
        flat = outer.fp32_groups_flat_partition[0]
    else:  # bf16 at stage 1 that accumulates in fp32
        address = mapping.hp_fragment_address
        start, offset, length = address.start, mapping.lp_fragment_address.start, address.numel
        flat = outer.fp32_groups_flat_partition[mapping.param_group_index]
    # The state that DeepSpeed's mapping caches goes stale after a load; optimizer.state is always the live one.
    return ParamShard(offset, flat.data.narrow(0, start, length), _moments(state, flat, start, length), owner=flat)


def _stage12_place(outer: Any, param: Any) -> tuple[int, int, int, int]:
    """(group, start in the master, offset in the parameter, length), in the order in which DeepSpeed has laid out the
    flat buffer: its own mapping, _hp_mapping, is wrong for round_robin_gradients."""
    number = param.param_idx_in_group
    group = next(g for g, own in enumerate(outer.bit16_groups) if number < len(own) and own[number] is param)
    first = outer.round_robin_bit16_offsets[group][outer.round_robin_bit16_indices[group][number]]
    size = outer.partition_size[group]
    left = size * dist.get_rank(group=outer.real_dp_process_group[group])
    start, stop = max(first, left), min(first + param.numel(), left + size)
    return (group, start - left, start - first, stop - start) if start < stop else (group, 0, 0, 0)


def _half_precision_master(outer: Any, param: nn.Parameter) -> tuple[Tensor, int] | None:
    """Stage 0 in a half precision: the fp32 tensor that holds the parameter's master, and where it starts in it."""
    for group, members in enumerate(getattr(outer, "fp16_groups", [])):
        start = 0
        for position, member in enumerate(members):
            if member is param:
                if hasattr(outer, "fp32_groups_flat"):
                    return outer.fp32_groups_flat[group], start
                return outer.fp32_groups[group][position], 0
            start += member.numel()
    return None


def _moments(state: Any, flat: Tensor, start: int, length: int) -> dict[str, Tensor]:
    entry = state.get(flat, {})
    return {name: entry[name].view(-1).narrow(0, start, length) for name in MOMENTS if name in entry}


def forward_copies(param: Any) -> Iterator[tuple[Tensor, int]]:
    """What forward reads or will be gathered from, apart from the master: (1-D view, its offset in the parameter)."""
    if hasattr(param, "ds_id"):
        partition = param.ds_tensor.data.view(-1)
        offset = param.ds_tensor.numel() * _partition_rank(param)
        yield partition.narrow(0, 0, max(0, min(partition.numel(), param.ds_numel - offset))), offset
        if param.data.numel() == param.ds_numel:  # small parameters stay gathered
            yield param.data.view(-1), 0
    else:
        yield param.data.view(-1), 0


def release_gathered(engine: Any) -> None:
    """Leave of stage 3's copies only those that stay gathered for ever; others may have been left by a forward pass."""
    if hasattr(engine.optimizer, "_partition_all_parameters"):
        engine.optimizer._partition_all_parameters()


def _partition_rank(param: Any) -> int:
    return int(param._z3_optimizer._get_param_partition_rank(param))


@torch.no_grad()
def zero_blocks(engine: Any, param: nn.Parameter, slots: Tensor, second_moment: float = 0.0) -> None:
    """Zero the blocks `slots` (int64 [n], ascending) of a [K, B, B] parameter in this rank's master and moments and in
    every copy that forward reads. second_moment: what exp_avg_sq becomes. Local: no communication."""
    shape = full_shape(param)
    block_numel = shape[1] * shape[2]
    shard = param_shard(engine, param)
    for kind, tensor in {"master": shard.master, **shard.moments}.items():
        fill_blocks_(tensor, shard.offset, block_numel, slots, second_moment if kind == "exp_avg_sq" else 0.0)
    for tensor, offset in forward_copies(param):
        fill_blocks_(tensor, offset, block_numel, slots)


def flat_masters(engine: Any) -> list[Tensor]:
    """The tensors that the inner optimizer keeps state for."""
    outer = engine.optimizer
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(outer, name):
            return [tensor for tensor in getattr(outer, name) if tensor.numel()]
    if hasattr(outer, "fp32_groups_flat"):
        return list(outer.fp32_groups_flat)
    if hasattr(outer, "fp32_groups"):
        return [tensor for group in outer.fp32_groups for tensor in group]
    return [param for group in outer.param_groups for param in group["params"]]


@torch.no_grad()
def set_adam_step(engine: Any, step: int) -> None:
    """Set Adam's step count everywhere, creating zero moments where the optimizer has no state yet."""
    optimizer = inner_optimizer(engine)
    for flat in flat_masters(engine):
        entry = optimizer.state[flat]
        for name in MOMENTS:
            if name not in entry:
                entry[name] = torch.zeros_like(flat.data)
        # Fused AdamW reads its step count on the device, the others on the host.
        device = flat.device if optimizer.defaults.get("fused") else torch.device("cpu")
        entry["step"] = torch.tensor(float(step), device=device)


def adam_step(engine: Any) -> int:
    """Adam's step count: optimizer steps that were applied, 0 before the first."""
    state = inner_optimizer(engine).state
    steps = [int(state[flat]["step"]) for flat in flat_masters(engine) if "step" in state.get(flat, {})]
    return max(steps, default=0)


def gradients_are_partitioned(engine: Any) -> bool:
    """Whether each element of the averaged gradient stands on one rank; else every rank holds all of it."""
    return hasattr(engine.optimizer, "averaged_gradients")


def reduced_gradients(engine: Any) -> list[Tensor]:
    """After the last backward of a step: what this rank holds of the averaged gradient, as live views of any shape."""
    outer = engine.optimizer
    if hasattr(outer, "averaged_gradients"):
        return [part for parts in outer.averaged_gradients.values() for part in parts or ()]
    if hasattr(outer, "fp32_groups_gradients_flat"):  # bf16 at stage 1 that accumulates in fp32
        return list(outer.fp32_groups_gradients_flat)
    members = getattr(outer, "fp16_groups", None) or [group["params"] for group in outer.param_groups]
    return [param.grad for group in members for param in group if param.grad is not None]


def loss_scale(engine: Any) -> float:
    """What the loss of the step in hand was multiplied by; 1 unless fp16."""
    return float(getattr(_loss_scaler(engine), "cur_scale", 1.0))


def loss_of_backward(engine: Any, loss: Tensor) -> Tensor:
    """What DeepSpeed's backward makes of a loss before it computes gradients, by the same operations."""
    loss = loss / engine.gradient_accumulation_steps()
    scaled: Tensor = engine.optimizer.scale_if_loss(loss) if hasattr(engine.optimizer, "scale_if_loss") else loss
    return scaled


def loss_scaler(engine: Any) -> dict[str, float]:
    """The numbers of DeepSpeed's loss scaler, for a checkpoint."""
    scaler = _loss_scaler(engine)
    return {name: value for name, value in vars(scaler).items() if _is_number(value)} if scaler else {}


def set_loss_scaler(engine: Any, numbers: dict[str, float]) -> None:
    """Set what `loss_scaler` returned, as far as this precision's scaler has it."""
    scaler = _loss_scaler(engine)
    for name, value in numbers.items():
        if _is_number(getattr(scaler, name, None)):
            setattr(scaler, name, value)


def loss_scale_can_fall(engine: Any) -> bool:
    """Whether an overflow makes the loss scale smaller: fp16 with a dynamic scale above its minimum."""
    scaler = _loss_scaler(engine)
    dynamic = getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False)
    least = getattr(scaler, "min_scale", None) or getattr(scaler, "min_loss_scale", None) or 0.0
    return bool(dynamic) and scaler.cur_scale > least


def keep_minimal_loss_scale(engine: Any) -> None:
    """An overflow at the minimum is a skipped step like others, and no exception."""
    scaler = _loss_scaler(engine)
    if hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False


def _loss_scaler(engine: Any) -> Any:
    outer = engine.optimizer
    return getattr(outer, "loss_scaler", None) or getattr(outer, "loss_scale_config", None)  # the latter at stage 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
