"""What a rank sends: bytes handed to each collective, and bytes on the wire of it.

Handed in is what follows from the shapes. On the wire is what the usual ring algorithms send of it, and receive as
much: 2 (W - 1)/W of an all-reduce, (W - 1)/W of a reduce-scatter, W - 1 times what a rank adds to an all-gather (Thakur
et al. 2005, doi:10.1177/1094342005051521) or an exchange (base/exchange.py). NCCL may take a tree, which sends about as
much. W ranks, N elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dsbert.base.own_time import PHASES
from dsbert.jobs.capacity.figures import Figure, Part
from dsbert.jobs.capacity.workload import Workload
from dsbert.jobs.capacity.zero_layout import ZeroLayout

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "exchange"]
SCORE_BYTES = 8  # of a block: int64 (sparse/flat_blocks.py)


@dataclass(frozen=True)
class Message:
    """What every rank hands to one kind of collective. handed_bytes: of a step, or of a mask update; calls: those that
    are waited for; bulk: over the device's network, else small and between CPUs."""

    what: str
    collective: Collective
    handed_bytes: float
    calls: float
    how: str
    bulk: bool = True

    def wire_bytes(self, ranks: int) -> float:
        """That a rank sends, and receives."""
        share = {
            "all_reduce": 2 * (ranks - 1) / ranks,
            "all_gather": ranks - 1,
            "reduce_scatter": (ranks - 1) / ranks,
            "exchange": ranks - 1,
        }
        return self.handed_bytes * share[self.collective]


def step_messages(layout: ZeroLayout, work: Workload) -> Iterator[Message]:
    """Of an optimizer step."""
    numel, ranks, stage = layout.numel, layout.ranks, layout.stage
    often = work.accumulation_steps if stage >= 2 else 1
    buckets = often * -(-numel // layout.bucket_numel)
    each = "with every micro-batch" if often > 1 else "once"
    if stage < 3:
        sent = often * numel * layout.gradient_bytes
        how = f"N x {layout.gradient_bytes} bytes, {each}"
        yield Message("gradients", "all_reduce", sent, buckets, how)
    else:
        padded = ranks * layout.partition_numel
        how = f"N x {layout.gradient_bytes} bytes, {each}, padded to the ranks"
        yield Message("gradients", "reduce_scatter", often * padded * layout.gradient_bytes, buckets, how)
    if stage in (1, 2):
        how = f"the new weights of a rank's partition, {layout.element_bytes} bytes each"
        yield Message("weights", "all_gather", layout.partition_numel * layout.element_bytes, 2, how)
    elif stage == 3:
        yield _gathers(layout, work)
    objectives = len(layout.size.spec.objectives)
    counts, verdict = objectives + 5 + len(PHASES) + 1, objectives + 2
    how = "counts, flags and own times, which nobody waits for; norm and losses"
    yield Message("control", "exchange", 8 * (counts + verdict), 1, how, bulk=False)
    if layout.size.recipe.sparsity.group_lasso and layout.size.layers:
        how = f"{SCORE_BYTES} bytes a block"
        yield Message("group lasso", "all_reduce", SCORE_BYTES * layout.size.num_blocks, 1, how, bulk=False)


def _gathers(layout: ZeroLayout, work: Workload) -> Message:
    """Stage 3: large weights are gathered for forward and stay for backward, or, where they are more than
    DeepSpeed lets live, are gathered for it again; small ones, which always stay, are gathered after the optimizer."""
    partitioned = layout.partition_numel - -(-layout.persistent_numel // layout.ranks)
    times = (1 if layout.stays_gathered else 2) * work.accumulation_steps
    handed = times * partitioned + layout.persistent_numel / layout.ranks
    modules = len(layout.size.parameters)
    how = f"a rank's part of large weights, {times} times a step, of small ones once, {layout.element_bytes} bytes"
    return Message("weights", "all_gather", handed * layout.element_bytes, times * modules, how)


def update_messages(layout: ZeroLayout) -> Iterator[Message]:
    """Of a mask update (sparse/mask_manager.py)."""
    config = layout.size.recipe.sparsity
    if config.pattern != "dynamic":
        return
    yield Message(
        "scores of blocks", "all_reduce", SCORE_BYTES * layout.size.num_blocks, 1, "8 bytes a block", bulk=False
    )
    if config.regrow != "random":
        dense = sum(layer.shape[0] * layer.shape[1] for layer in layout.size.layers.values())
        yield Message("dense gradients", "all_reduce", 4 * dense, 1, "fp32, of every position of a sparse weight")


def traffic(layout: ZeroLayout, work: Workload) -> Part:
    """Bytes of a rank, by kind."""
    figures: list[Figure] = []
    for message in step_messages(layout, work):
        figures += _figures(message, layout.ranks, "a step")
    for message in update_messages(layout):
        figures += _figures(message, layout.ranks, "a mask update")
    return Part("wire", tuple(figures))


def _figures(message: Message, ranks: int, when: str) -> Iterator[Figure]:
    head = f"{message.what}, {when}"
    how = f"{message.collective}: {message.how}"
    yield Figure(f"{head}: handed in", message.handed_bytes, "bytes", "computed", how)
    yield Figure(f"{head}: sent", message.wire_bytes(ranks), "bytes", "estimated", f"its share of the {how}")
