"""The rank-synchronized mask manager: one collective decision per update, the same topology on every rank.

A surviving block never moves. A pruned slot is RE-POINTED: new coordinates, weights and moments zero. Shapes never
change, so flat buffers, ZeRO partitions and the optimizer need not know that anything happened.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from dsbert.base.collectives import all_reduce, assert_replicas_agree, gather
from dsbert.base.errors import PeerError
from dsbert.sparse.block_editor import BlockEditor
from dsbert.sparse.config import SparsityConfig
from dsbert.sparse.draw import DrawKey
from dsbert.sparse.flat_blocks import PRUNE_SCORES
from dsbert.sparse.fresh_moments import exact_mean
from dsbert.sparse.linear import BlockSparseLinear
from dsbert.sparse.regrow import REGROW_RULES, prune_and_regrow
from dsbert.sparse.schedule import UpdateSchedule
from dsbert.sparse.topology import BlockTopology, TopologyUpdate, combined_digest, pack_bits, unpack_bits
from dsbert.sparse.update_norms import NormSummary, norm_summary

# The age of blocks that stand where the start has put them, in updates.
_OLDEST = 2**31 - 1


def state_parts(fresh_moments: str) -> tuple[str, ...]:
    """What `MaskManager.state_dict` holds of each layer, under such a configuration."""
    return ("rows", "cols", "born", "explored") + (("born_step",) if fresh_moments == "count" else ())


@dataclass(frozen=True, eq=False)
class MaskUpdate:
    """What an update did. removed_new_ratio: share of the pruned blocks that the previous update had allocated. norms:
    by layer, of the blocks that it kept and dropped (update_norms.py)."""

    number: int
    step: int
    layers: dict[str, TopologyUpdate]
    removed_new_ratio: float
    dof: float
    digest: str
    seconds: float
    norms: dict[str, NormSummary] = field(default_factory=dict)

    @property
    def num_pruned(self) -> int:
        return sum(update.num_pruned for update in self.layers.values())


class MaskManager:
    """Moves the pattern of `layers` as the schedule says (paper, algorithm 1).

    Call `maybe_update(step)` after every optimizer step, step = 1, 2, ... If the rule of regrowth
    needs it, the layers are armed one step ahead to collect the dense gradient: fp32 [out, in] per layer, alive during
    that step only, and one all-reduce of all of them. PeerError on every rank if the ranks' topologies ever differ.
    The age of a block is counted in updates, so that it does not depend on how many steps lie between them.
    """

    def __init__(
        self,
        layers: dict[str, BlockSparseLinear],
        config: SparsityConfig,
        *,
        total_steps: int,
        editor: BlockEditor,
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.layers = layers
        self.config = config
        self._editor = editor
        self._seed = seed
        self._group = group
        self._score = PRUNE_SCORES[config.prune_score]
        self._rule = REGROW_RULES[config.regrow]
        dynamic = config.pattern == "dynamic" and layers
        self._schedule = UpdateSchedule.of(config, total_steps) if dynamic else None
        self.topologies = {name: layer.topology for name, layer in layers.items()}
        # Which positions were ever active (bool [R, C]); the update that allocated each slot (int32 [K], 0 = start).
        self._explored = {name: topology.mask() for name, topology in self.topologies.items()}
        self._born = {name: torch.zeros(layer.num_active, dtype=torch.int32) for name, layer in layers.items()}
        # Adam's step count when an update allocated each slot (int32 [K], 0 = start), where each counts its own.
        self._born_step: dict[str, Tensor] = {}
        if "born_step" in state_parts(config.fresh_moments):
            self._born_step = {name: torch.zeros_like(born) for name, born in self._born.items()}
            editor.count_own_steps(layers, self._born_step)
        self._arm(step=1)

    def maybe_update(self, step: int) -> MaskUpdate | None:
        """Update the masks if an update is due after optimizer step `step`; collective, the same on all ranks."""
        schedule, update = self._schedule, None
        if schedule is not None and (number := schedule.update_number(step)) is not None:
            update = self._update(number, step, schedule)
        self._arm(step + 1)
        return update

    def is_due(self, step: int) -> bool:
        """Whether an update follows optimizer step `step`."""
        return self._schedule is not None and self._schedule.is_update_step(step)

    @property
    def density(self) -> float:
        """Share of all sparse weights' positions that are active now."""
        return self._fraction(lambda name: self.topologies[name].num_active)

    @property
    def dof(self) -> float:
        """Explored degrees of freedom: share of all positions that were active at any time so far (paper, measures)."""
        return self._fraction(lambda name: int(self._explored[name].count_nonzero()))

    def digest(self) -> str:
        """32 hex digits over all layers, from the buffers that the kernels read."""
        return combined_digest({name: layer.digest() for name, layer in self.layers.items()})

    def verify_replicas(self) -> None:
        """Raise PeerError, naming layer and rank, unless all ranks' kernels read one topology, in slot order, and each
        rank's own record agrees with its kernels. Collective."""
        kernels = {name: layer.digest() for name, layer in self.layers.items()}
        own = [kernels[name] == topology.digest() for name, topology in self.topologies.items()]
        agree = gather(torch.tensor(own, dtype=torch.uint8), self._group).bool()
        if not bool(agree.all()):
            rank, column = (~agree).nonzero()[0].tolist()
            error = PeerError(
                f"expected kernels and mask manager to hold one topology of {list(self.layers)[column]}, found two on "
                f"rank {rank}"
            )
            error.ranks = (rank,)
            raise error.for_all()
        assert_replicas_agree("the topology", kernels, self._group)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that is not in the parameters, as `state_parts` names it: topology, birth of every slot, explored
        positions as bits (CPU tensors)."""
        state = {}
        for name, topology in self.topologies.items():
            state[f"{name}.rows"], state[f"{name}.cols"] = topology.rows, topology.cols
            state[f"{name}.born"] = self._born[name].clone()
            state[f"{name}.explored"] = pack_bits(self._explored[name])
        return state | {f"{name}.born_step": births.clone() for name, births in self._born_step.items()}

    def load_state_dict(self, state: dict[str, Tensor], *, step: int) -> None:
        """Restore after `step` optimizer steps. Raises ValueError if shapes or K differ."""
        for name, layer in self.layers.items():
            rows, cols = state[f"{name}.rows"], state[f"{name}.cols"]
            topology = BlockTopology(layer.shape, layer.block_size, rows, cols)
            layer.set_topology(topology)
            self.topologies[name] = topology
            self._born[name] = state[f"{name}.born"].clone()
            self._explored[name] = unpack_bits(state[f"{name}.explored"], topology.grid)
        for name, births in self._born_step.items():
            births.copy_(state[f"{name}.born_step"])  # in place: the editor reads them
        self._arm(step + 1)

    def _fraction(self, count: Callable[[str], int]) -> float:
        total = sum(mask.numel() * self.layers[name].block_size ** 2 for name, mask in self._explored.items())
        kept = sum(count(name) * layer.block_size**2 for name, layer in self.layers.items())
        return kept / total if total else 1.0

    def _arm(self, step: int) -> None:
        """Have the layers collect their dense gradient if an update that needs it follows `step`."""
        due = self._rule.needs_gradient and self.is_due(step)
        for layer in self.layers.values():
            layer.dense_gradient = (
                torch.zeros(layer.shape, dtype=torch.float32, device=layer.rows.device) if due else None
            )

    def _update(self, number: int, step: int, schedule: UpdateSchedule) -> MaskUpdate:
        start = time.perf_counter()
        self.verify_replicas()  # the update rewrites the kernels' buffers: it must not heal what went wrong before it
        scores = self._reduced_scores()
        compared = self._set_against_ages(scores, number)
        gradient_norms = self._reduced_gradient_norms()
        updates = {}
        for name, topology in self.topologies.items():
            key = DrawKey(self._seed, "regrow", number, name)
            count = schedule.num_pruned(step, topology.num_active)
            updates[name] = prune_and_regrow(
                topology, compared[name], count, key, self.config.regrow, gradient_norms.get(name), self.config.balance,
                self._may_prune(name, number),
            )  # fmt: skip
        second_moments = self._fresh_second_moments(updates)
        # Every decision is taken before the first weight is touched.
        removed_new = pruned = 0
        norms = {}
        for name, update in updates.items():
            new = self._born[name] == (number - 1 or -1)  # before the first update none is
            norms[name] = norm_summary(scores[name], self._score, update.slots, new)
            removed_new += int(new[update.slots].sum())
            pruned += update.num_pruned
            self._apply(name, update, number, second_moments.get(name, 0.0))
        if self._born_step:
            for name, count in self._editor.step_counts(self.layers).items():
                self._born_step[name][updates[name].slots] = count
        self.verify_replicas()
        return MaskUpdate(
            number, step, updates, removed_new / max(pruned, 1), self.dof, self.digest(), time.perf_counter() - start,
            norms,
        )  # fmt: skip

    def _may_prune(self, name: str, number: int) -> Tensor | None:
        """bool [K]: blocks that update `number` may prune; None if all."""
        return self._ages(name, number) >= self.config.min_age_updates if self.config.min_age_updates else None

    def _ages(self, name: str, number: int) -> Tensor:
        """int64 [K]: at update `number`, how many updates ago each block was allocated, 1 or more. Those of the start,
        which did not begin at zero, are not young at any time."""
        born = self._born[name].long()
        return torch.where(born == 0, _OLDEST, number - born)

    def _apply(self, name: str, update: TopologyUpdate, number: int, second_moment: float) -> None:
        layer = self.layers[name]
        self._editor.zero_blocks(layer, update.slots.to(layer.rows.device), second_moment)
        self.topologies[name] = self.topologies[name].replace(update)
        layer.set_topology(self.topologies[name])
        self._born[name][update.slots] = number
        self._explored[name][update.rows.long(), update.cols.long()] = True

    def _reduced_scores(self) -> dict[str, Tensor]:
        """By layer the blocks' scores (int64 [K], CPU), after ONE all-reduce over all layers."""
        parts = [self._editor.block_scores(layer, self._score) for layer in self.layers.values()]
        flat = all_reduce(torch.cat(parts), self._score.combine, self._group).cpu()
        return dict(zip(self.layers, flat.split([part.numel() for part in parts]), strict=True))

    def _set_against_ages(self, scores: dict[str, Tensor], number: int) -> dict[str, Tensor]:
        """By layer what update `number` compares blocks by: [K], CPU."""
        by_age = self._score.by_age
        return scores if by_age is None else {
            name: by_age(own, self._ages(name, number)) for name, own in scores.items()
        }  # fmt: skip

    def _fresh_second_moments(self, updates: dict[str, TopologyUpdate]) -> dict[str, float]:
        """By layer what Adam's second moment of regrown blocks begins as, after ONE all-reduce; {} where it is zero."""
        if self.config.fresh_moments != "mean":
            return {}
        kept = {name: torch.ones(layer.num_active, dtype=torch.bool) for name, layer in self.layers.items()}
        for name, update in updates.items():
            kept[name][update.slots] = False
        parts = [self._editor.second_moment_sum(layer, kept[name]) for name, layer in self.layers.items()]
        sums = all_reduce(torch.stack(parts), "sum", self._group).cpu()
        return {
            name: exact_mean(words, int(kept[name].sum()) * layer.block_size**2)
            for (name, layer), words in zip(self.layers.items(), sums, strict=True)
        }

    def _reduced_gradient_norms(self) -> dict[str, Tensor]:
        """L1 norms [R, C] of the blocks of the GLOBAL batch's dense gradient, after ONE all-reduce; {} if unused. A
        norm that is not finite counts as 0, so that a step with such gradients has an order of blocks, too."""
        if not self._rule.needs_gradient:
            return {}
        gradients = self.dense_gradients()
        norms = {}
        for name, layer in self.layers.items():
            num_rows, num_cols = self.topologies[name].grid
            blocked = gradients[name].view(num_rows, layer.block_size, num_cols, layer.block_size)
            norms[name] = blocked.abs().sum((1, 3)).nan_to_num_(nan=0.0, posinf=0.0).cpu()
        return norms

    def dense_gradients(self) -> dict[str, Tensor]:
        """The dense gradients [out, in] of the global batch, fp32: summed over micro-batches in backward, over ranks
        here. Collective. Frees the layers' buffers. Raises RuntimeError unless the layers were armed."""
        buffers = [layer.dense_gradient for layer in self.layers.values()]
        if any(buffer is None for buffer in buffers):
            raise RuntimeError("expected the layers armed for this step: call maybe_update after every step")
        flat = torch.cat([buffer.flatten() for buffer in buffers if buffer is not None])
        all_reduce(flat, "sum", self._group).div_(self._editor.gradient_divisor())
        for layer in self.layers.values():
            layer.dense_gradient = None
        parts = flat.split([layer.shape[0] * layer.shape[1] for layer in self.layers.values()])
        return {name: part.view(layer.shape) for (name, layer), part in zip(self.layers.items(), parts, strict=True)}
