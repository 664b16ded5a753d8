"""Memory of one rank, by part, at the moment when it holds most; and the micro-batch that fits.

What tensors need. An allocator holds more than that, and a process its libraries: both are said beside, as estimates.
The moments of a step that may be the fullest: forward's end, with what the loss makes; the loss's gradient; the first
layer of backward; its end, with all gradients; the reduction, for which DeepSpeed copies them once more; and the step
of the optimizer, in fp32. N elements of all parameters, N'
on a rank, e bytes of an element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsbert.jobs.capacity.activation_memory import ActivationBytes, MicroBatchShape, activation_bytes
from dsbert.jobs.capacity.figures import Figure, Kind, Part, total
from dsbert.jobs.capacity.workload import Workload
from dsbert.jobs.capacity.zero_layout import ZeroLayout

_FP32 = 4
_CPU_PROCESS_BYTES = 450e6  # resident with its imports, before there is a model (docs/benchmarks.md)
_CARD_CONTEXT_BYTES = 1.5e9  # CUDA, NCCL's buffers, cuBLAS's workspace
_SLACK = 1.1  # what an allocator holds beyond what is asked of it


@dataclass(frozen=True)
class Standing:
    """Of a rank, always there. weights: what forward reads; masters, moments: fp32; index: of the sparse layers, and
    small buffers; gradients, buckets: of stage 3, which never lets go of them."""

    weights: float
    masters: float
    moments: float
    index: float
    gradients: float = 0
    buckets: float = 0

    @property
    def bytes(self) -> float:
        """All of it."""
        return self.weights + self.masters + self.moments + self.index + self.gradients + self.buckets


def standing(layout: ZeroLayout) -> Standing:
    """What is there between steps."""
    held, e, numel = layout.partition_numel, layout.element_bytes, layout.numel
    index = sum(layer.index_bytes for layer in layout.size.layers.values())
    moments = 2 * _FP32 * held
    if layout.stage == 0:  # in fp32 the parameter is its own master
        return Standing(e * numel, _FP32 * held if e < _FP32 else 0, moments, index)
    if layout.stage < 3:
        return Standing(e * layout.flat_numel, _FP32 * held, moments, index)
    weights = e * (held + layout.persistent_numel)
    return Standing(weights, _FP32 * held, moments, index, e * held, e * layout.bucket_numel)


@dataclass(frozen=True)
class Moment:
    """What stands beside what is always there, at one moment of a step."""

    name: str
    gradients: float
    activations: float
    buffers: float

    @property
    def bytes(self) -> float:
        """All of it."""
        return self.gradients + self.activations + self.buffers


def moments_of_a_step(layout: ZeroLayout, acts: ActivationBytes, accumulation_steps: int) -> list[Moment]:
    """By their order."""
    e, numel, part, stage = layout.element_bytes, layout.numel, layout.partition_numel, layout.stage
    bucket = e * layout.bucket_numel if stage in (1, 2) else 0
    if layout.settings.zero_optimization.overlap_comm:
        bucket *= 2
    gathered = e * (numel - layout.persistent_numel) if stage == 3 else 0
    # Between micro-batches: whole gradients, or with stage 2 a rank's part of them and mostly, though not always, the
    # bucket of the micro-batch before; with stage 3, likewise, what was scattered.
    kept = {0: e * numel, 1: e * numel, 2: e * part + bucket, 3: e * numel}[stage] if accumulation_steps > 1 else 0
    # The largest matrix has two gradients, which meet at the end: of the embedding, and of the decoder that is tied to
    # it.
    twice = e * max(map(math.prod, layout.size.parameters.values()))
    # With stages 2 and 3 the others are put into the bucket as they come, and are held once.
    at_end = e * numel if stage < 2 else kept + twice
    copy = e * min(layout.bucket_numel, numel)
    wider = _FP32 * part if e < _FP32 else 0
    own = {0: e * numel, 1: 2 * e * part, 2: 2 * e * part, 3: 0}[stage]
    return [
        Moment("forward's end", kept, acts.kept + acts.head + acts.head_working, gathered),
        Moment("the loss's gradient", kept, acts.kept + acts.head + acts.head_gradient, bucket + gathered),
        Moment("backward's first layer", kept, acts.kept + acts.head + acts.layer_working, bucket + gathered),
        Moment("backward's end", at_end + twice, 0, bucket + gathered),
        Moment("the reduction", e * numel if stage == 0 else kept if stage == 2 else 0, 0, bucket + copy),
        Moment("the optimizer's step", own + wider, 0, 0),
    ]


def rank_memory(layout: ZeroLayout, work: Workload, *, on_card: bool, widened: bool = False) -> Part:
    """Bytes of a rank, by part, when it holds most."""
    there = standing(layout)
    most = _most(layout, work, work.micro_lengths(), on_card, widened)
    fullest = _most(layout, work, work.fullest_lengths(), on_card, widened)
    kind: Kind = "estimated" if on_card else "computed"
    e = layout.element_bytes
    tensors = (
        Figure("weights", there.weights, "bytes", "computed", f"what forward reads, {e} bytes each"),
        Figure("masters", there.masters, "bytes", "computed", "fp32, of N' elements; at stage 0 in fp32 the weights"),
        Figure("moments", there.moments, "bytes", "computed", "Adam's two, fp32, of N' elements"),
        Figure("gradients", most.gradients + there.gradients, "bytes", kind, f"held at once, {e} bytes each"),
        Figure(
            "activations", most.activations, "bytes", kind, f"of a micro-batch of {work.micro_batch}, at {most.name}"
        ),
        Figure(
            "buffers", most.buffers + there.buckets, "bytes", kind, f"buckets and copies of gradients, at {most.name}"
        ),
        Figure("topology", there.index, "bytes", "computed", "int32 coordinates and order of every block"),
    )
    snapshot = 3 * _FP32 * layout.owned_numel
    where = "page-locked, on the host" if on_card else "beside all else, from the first save on"
    process = _CARD_CONTEXT_BYTES if on_card else _CPU_PROCESS_BYTES
    what = "CUDA's context, NCCL, workspaces" if on_card else "imports and code of a rank"
    return Part(
        "memory of a rank",
        (
            *tensors,
            total("tensors", tensors, "their sum"),
            Figure(
                "fullest", there.bytes + fullest.bytes, "bytes", kind, "the same with the fullest micro-batch of a run"
            ),
            Figure("snapshot", snapshot, "bytes", "computed", f"masters and moments that a rank answers for: {where}"),
            Figure("process", process, "bytes", "estimated", what),
        ),
    )


def needed_bytes(memory: Part, *, on_card: bool) -> float:
    """Of the device, with what its allocator holds beyond: estimated."""
    host = 0 if on_card else memory["snapshot"].value
    return _SLACK * memory["fullest"].value + memory["process"].value + host


def largest_micro_batch(
    layout: ZeroLayout, work: Workload, memory_bytes: float, *, on_card: bool, widened: bool = False
) -> int:
    """The largest, up to a rank's share of the global batch, that fits; 0 if not even one sample does."""

    def fits(micro_batch: int) -> bool:
        share = Workload.of(layout.size.recipe, work.ranks, work.samples, micro_batch)
        memory = rank_memory(layout, share, on_card=on_card, widened=widened)
        return needed_bytes(memory, on_card=on_card) <= memory_bytes

    low, high = 0, -(-work.global_batch // work.ranks)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _most(layout: ZeroLayout, work: Workload, lengths: NDArray[np.int64], on_card: bool, widened: bool) -> Moment:
    """The moment when a micro-batch of such lengths, int64 [n], has the rank hold most."""
    tokens, predictions = int(lengths.sum()), work.predictions(lengths)
    shape = MicroBatchShape(work.micro_batch, tokens, predictions, layout.element_bytes, on_card, widened)
    acts = activation_bytes(layout.size, shape)
    return max(moments_of_a_step(layout, acts, work.accumulation_steps), key=lambda moment: moment.bytes)
