"""Seconds on a card of which there is a data sheet and no measurement: all estimates, each with its formula.

A product takes its FLOPs over the share of the peak that such products reach; what goes over elements takes its bytes
over the share of the bandwidth; either takes at least as long as its kernels are launched (a roofline: Williams et al.
2009, doi:10.1145/1498765.1498785). Collectives: bytes on the wire over the bandwidth, and a latency for each step of a
tree. Nothing overlaps: DeepSpeed's overlap_comm hides some of what is on the wire.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from dsbert.jobs.capacity.activation_memory import MicroBatchShape, activation_bytes
from dsbert.jobs.capacity.cards import Card
from dsbert.jobs.capacity.costs import Costs
from dsbert.jobs.capacity.figures import Figure
from dsbert.jobs.capacity.wire_traffic import Message, step_messages, update_messages
from dsbert.jobs.capacity.workload import Workload
from dsbert.jobs.capacity.zero_layout import ZeroLayout
from dsbert.sparse.flops import attention_flops, linear_flops

# Forward writes what is kept, backward reads it and writes as large gradients, and reads those.
_PASSES = 4
_KERNELS_A_LAYER, _KERNELS_AROUND = 70, 60  # launched for a micro-batch, forward and backward
_OPTIMIZER_PASSES = 8  # fp32: gradient read twice, master and moments read and written
_HOST_LATENCY_S = 50e-6  # of a small message between CPUs, over TCP
# A mask update, decided on the CPU: BERT-Base at block 16 and 1 (tools/bench_mask_update.py, README.md).
_UPDATE_S_A_LAYER, _UPDATE_S_A_BLOCK = 1.4e-3, 165e-9
_HASH_BYTES_PER_S = 10e9


def costs_on_card(card: Card, layout: ZeroLayout, work: Workload, ranks_per_node: int) -> Costs:
    """Of a rank on such a card."""
    bandwidth = _bandwidth(card, layout.ranks, ranks_per_node)
    micro = tuple(_micro_batch(card, layout, work))
    step = (
        *(_times(figure, work.accumulation_steps) for figure in micro),
        _optimizer(card, layout),
        *_wires(card, layout, work, bandwidth),
    )
    forward_s = sum(figure.value for figure in micro) / 3
    rounds = -(-layout.size.recipe.eval.sequences // (work.micro_batch * work.ranks))
    how = f"a third of a micro-batch, {rounds} times"
    sent = sum(_seconds(card, message, layout.ranks, bandwidth) for message in update_messages(layout))
    decided = _UPDATE_S_A_LAYER * len(layout.size.layers) + _UPDATE_S_A_BLOCK * layout.size.num_blocks
    own = 12 * layout.owned_numel
    copied = (own + layout.element_bytes * layout.numel) / card.host_bytes_per_s
    peak = card.peak_flops_per_s(layout.precision)
    return Costs(
        step,
        Figure("validation", rounds * forward_s, "s", "estimated", how),
        Figure("mask update", decided + sent, "s", "estimated", "1.4 ms a layer + 165 ns a block + what is sent"),
        Figure(
            "training waits at a save", copied + layout.element_bytes * layout.numel / _HASH_BYTES_PER_S, "s",
            "estimated", f"masters, moments and weights at {card.host_bytes_per_s:.3g} bytes/s, weights hashed",
        ),
        Figure(
            "published after", 2 * own / card.storage_bytes_per_s, "s", "estimated",
            f"a rank's file written and read back at {card.storage_bytes_per_s:.3g} bytes/s",
        ),
        Figure("peak", peak, "FLOP/s", "estimated", f"{layout.precision}, dense products: {card.source}"),
    )  # fmt: skip


def _micro_batch(card: Card, layout: ZeroLayout, work: Workload) -> Iterator[Figure]:
    """Forward and backward of one."""
    size, model = layout.size, layout.size.recipe.model
    lengths = work.micro_lengths()
    tokens, predictions = int(lengths.sum()), work.predictions(lengths)
    peak = card.peak_flops_per_s(layout.precision)
    again = 4 / 3 if model.activation_checkpointing else 1
    sparse = sum(kept for name, (_, _, kept) in size.linears.items() if name in size.layers)
    dense = size.kept - sparse
    for name, weights, share in (("sparse", sparse, card.sparse_share), ("dense", dense, card.dense_share)):
        if weights:
            seconds = again * linear_flops(tokens, weights) / (share * peak)
            how = f"6 T x kept weights / ({share:g} of {peak:.3g} FLOP/s)"
            yield Figure(f"{name} products", seconds, "s", "estimated", how)
    flops = attention_flops(size.spec.attention_pairs(model, lengths), model.hidden_size)
    rate = f"({card.dense_share:g} of {peak:.3g} FLOP/s)"
    yield Figure("attention", again * flops / (card.dense_share * peak), "s", "estimated", f"12 pairs H / {rate}")
    head = linear_flops(predictions, model.hidden_size * (model.hidden_size + size.vocab_size))
    yield Figure("prediction of tokens", head / (card.dense_share * peak), "s", "estimated", f"6 m H (H + V) / {rate}")
    shape = MicroBatchShape(work.micro_batch, tokens, predictions, layout.element_bytes, on_card=True)
    acts = activation_bytes(size, shape)
    moved = _PASSES * (acts.kept + acts.head) / (card.memory_share * card.memory_bytes_per_s)
    how = f"{_PASSES} x what is kept / ({card.memory_share:g} of {card.memory_bytes_per_s:.3g} bytes/s)"
    yield Figure("element by element", moved, "s", "estimated", how)
    launches = again * (_KERNELS_A_LAYER * model.num_layers + _KERNELS_AROUND) * card.launch_s
    waiting = max(0.0, launches - moved)
    how = f"{_KERNELS_A_LAYER} kernels a layer x {card.launch_s:g} s, as far as nothing else takes as long"
    yield Figure("launches", waiting, "s", "estimated", how)


def _optimizer(card: Card, layout: ZeroLayout) -> Figure:
    moved = _OPTIMIZER_PASSES * 4 * layout.partition_numel + 4 * layout.element_bytes * layout.numel
    how = "8 fp32 passes over a rank's part, 4 over all gradients"
    return Figure("optimizer", moved / (card.memory_share * card.memory_bytes_per_s), "s", "estimated", how)


def _wires(card: Card, layout: ZeroLayout, work: Workload, bandwidth: float) -> Iterator[Figure]:
    for message in step_messages(layout, work):
        seconds = _seconds(card, message, layout.ranks, bandwidth)
        if message.bulk:
            how = f"{message.collective}: bytes sent / {bandwidth:.3g} bytes/s + 2 log2 W x {card.latency_s:g} s"
        else:
            how = f"over gloo, between CPUs: {_turns(message, layout.ranks)} x {_HOST_LATENCY_S:g} s"
        yield Figure(f"{message.what} on the wire", seconds, "s", "estimated", how)


def _seconds(card: Card, message: Message, ranks: int, bandwidth: float) -> float:
    if ranks == 1:
        return 0.0
    latency = card.latency_s if message.bulk else _HOST_LATENCY_S
    return message.wire_bytes(ranks) / bandwidth + message.calls * _turns(message, ranks) * latency


def _turns(message: Message, ranks: int) -> int:
    """Messages that wait for each other: up a tree and down again, or of an exchange."""
    return (1 if message.collective == "exchange" else 2) * math.ceil(math.log2(ranks))


def _bandwidth(card: Card, ranks: int, ranks_per_node: int) -> float:
    """Bytes a second on the wire of a rank: of one node its links; of several at most all its ports together, since
    rings of NCCL leave a node through every port."""
    inside = card.link_bytes_per_s
    across = ranks_per_node * card.network_bytes_per_s
    return card.link_share * (inside if ranks <= ranks_per_node else min(inside, across))


def _times(figure: Figure, count: int) -> Figure:
    how = figure.how if count == 1 else f"{figure.how}, {count} micro-batches"
    return Figure(figure.name, figure.value * count, figure.unit, figure.kind, how)
