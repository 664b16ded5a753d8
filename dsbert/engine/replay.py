"""Silent data corruption: every so many steps a gradient is computed by two ranks, and must have the same bits.

A card, a core or a piece of memory that computes wrongly now and then spoils the weights of all ranks, and nothing else
shows it. Here it can be seen, since samples, dropout and kernels are functions of the step: any rank can compute any
micro-batch of it, to the bit. Each rank digests the gradient of its first micro-batch of the step, as backward makes
it, before it is summed or sent; and it has computed that of the next rank's, outside of DeepSpeed's accounts. Ranks
stand in a ring, so that each is checked by one and checks another. Where two differ, all ranks compute the disputed
micro-batch once more, and most of the digests say who was wrong.

What goes wrong later than backward (sums over ranks, the optimizer) is seen by the comparison of weights, not here.
Memory: the gradient of one micro-batch, whole, also at ZeRO stage 3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from dsbert.base.collectives import gather
from dsbert.base.errors import DsbertError, PeerError
from dsbert.cluster.process_group import World
from dsbert.config.sections import BatchConfig
from dsbert.engine.micro_batches import MicroBatch, cut
from dsbert.engine.step_guard import StepGuard
from dsbert.engine.zero_shards import loss_of_backward
from dsbert.sparse import BlockSparseLinear


class GradientReplay:
    """engine: DeepSpeed's; parameters: by name; guard: which takes no notice of gradients that are computed again.

    every_steps: 0, never, until it is set.
    """

    def __init__(
        self,
        engine: Any,
        parameters: Mapping[str, nn.Parameter],
        layers: Mapping[str, BlockSparseLinear],
        guard: StepGuard,
        world: World,
        batch: BatchConfig,
    ) -> None:
        self._engine, self._parameters, self._layers, self._guard = engine, parameters, layers, guard
        self._world, self._batch = world, batch
        self.every_steps = 0
        self._next: int | None = None
        self._step = 0
        self._loss: Callable[[MicroBatch], Tensor]
        self._theirs: int | None = None
        self._own: dict[str, int] = {}
        self._watching = False  # for gradients of this rank's first micro-batch
        for name, param in parameters.items():
            param.register_hook(lambda gradient, name=name: self._note(name, gradient))

    def begin(self, step: int, loss: Callable[[MicroBatch], Tensor]) -> None:
        """Before the first micro-batch of optimizer step `step`, counted from 1: compute the next rank's gradient if it
        is due, and watch for this rank's own. Collective at ZeRO stage 3. loss: of any micro-batch of the step."""
        if not self._is_due(step):
            return
        self._step, self._loss = step, loss
        self._theirs = self._digest((self._world.rank + 1) % self._world.world_size)
        self._own, self._watching = {}, True

    def own_pass_done(self) -> None:
        """The first micro-batch is through: gradients of later ones are not compared."""
        self._watching = False

    def compare(self) -> None:
        """After the last backward, before anything moves. Collective where a replay is due.

        Raises PeerError on every rank, naming those whose gradient is not what the others compute.
        """
        if self._theirs is None:
            return
        found = gather(torch.tensor([_combined(self._own), self._theirs]))
        self._theirs = None
        owns, theirs = found.unbind(1)
        disputed = (owns != theirs.roll(1)).nonzero().flatten().tolist()
        if not disputed:
            return
        guilty: set[int] = set()
        sure = True
        for owner in disputed[:2]:  # a rank that is always wrong has two, and so are all of them with two ranks
            checker = (owner - 1) % self._world.world_size
            first = {owner: int(owns[owner]), checker: int(theirs[checker])}
            again = gather(torch.tensor(self._digest(owner))).tolist()
            wrong = wrong_ranks(first, again)
            guilty |= wrong or set(first)
            sure &= bool(wrong)
        raise _corrupted(sorted(guilty), self._step, sure=sure or self._world.world_size == 1)

    def _is_due(self, step: int) -> bool:
        """At every so-manyth step. While layers collect dense gradients for regrowth, one step later: a replay would
        add to them."""
        if not self.every_steps:
            return False
        if self._next is None:
            self._next = -(-step // self.every_steps) * self.every_steps
        if step < self._next or any(layer.dense_gradient is not None for layer in self._layers.values()):
            return False
        self._next = (step // self.every_steps + 1) * self.every_steps
        return True

    def _digest(self, rank: int) -> int:
        """Of the gradient of a rank's first micro-batch of the step, computed here."""
        micro = cut(self._batch, rank, self._world.world_size)[0]
        with self._guard.paused():
            loss = loss_of_backward(self._engine, self._loss(micro))
            gradients = torch.autograd.grad(loss, list(self._parameters.values()), allow_unused=True)
        named = zip(self._parameters, gradients, strict=True)
        return _combined({name: _bits(gradient) for name, gradient in named if gradient is not None})

    def _note(self, name: str, gradient: Tensor) -> None:
        if self._watching:
            self._own[name] = _bits(gradient)


def wrong_ranks(first: Mapping[int, int], again: Sequence[int]) -> set[int]:
    """Whose digest of one micro-batch's gradient is not what most have: first: of the two ranks that differ; again: of
    all ranks, by rank, computed once more. Empty if no digest has more than half of them."""
    digest, count = Counter([*first.values(), *again]).most_common(1)[0]
    if 2 * count <= len(first) + len(again):
        return set()
    return {rank for rank, found in [*first.items(), *enumerate(again)] if found != digest}


def _corrupted(ranks: list[int], step: int, *, sure: bool) -> DsbertError:
    named = " and ".join(f"rank {rank}" for rank in ranks)
    whose = f"{named} compute{'s' * (len(ranks) == 1)}" if sure else f"one of {named} computes"
    error = PeerError(
        f"expected a gradient of step {step} to have the same bits when it is computed again, found that {whose} wrong "
        "ones: see to its machine (memory, cores, card) before it trains again; the step is not taken"
    )
    error.ranks = tuple(ranks)
    return error.for_all()


def _bits(gradient: Tensor) -> int:
    data = gradient.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return xxhash.xxh3_64_intdigest(data.numpy().data)


def _combined(digests: Mapping[str, int]) -> int:
    """Of all parameters, as a number that fits into int64."""
    text = "\0".join(f"{name}\0{digests[name]:016x}" for name in sorted(digests))
    return xxhash.xxh3_64_intdigest(text.encode()) >> 1
