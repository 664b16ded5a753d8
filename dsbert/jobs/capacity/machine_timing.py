"""Seconds on this machine: a few steps of the recipe's own micro-batch are taken, and the ranks of a run modelled.

As many processes as will share its cores take steps side by side, each a world of its own; what ranks do beyond that
(a part of the optimizer's work each, collectives) is added. Ranks of other machines are taken to be as fast, on a
network that nobody has measured.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dsbert.base.cores import usable_cores
from dsbert.base.errors import DsbertError
from dsbert.cluster.launcher import launch, module_command
from dsbert.jobs.capacity.costs import Costs
from dsbert.jobs.capacity.figures import Figure, Kind
from dsbert.jobs.capacity.wire_traffic import Message, step_messages, update_messages
from dsbert.jobs.capacity.workload import Workload
from dsbert.jobs.capacity.zero_layout import ZeroLayout

Clock = Literal["wall", "cpu"]
_MOST_TOKENS = 8192  # of a micro-batch that is timed; larger ones take as much longer as they are larger
_MOST_RANKS = 8  # of the collectives that are timed
_NETWORK_BYTES_PER_S = 1.25e9  # 10 Gbit/s


@dataclass(frozen=True)
class Timings:
    """Seconds of one of the processes that run side by side, medians. tokens: of the micro-batch. snapshot_s,
    digests_s, finite_s: parts of a save, of the whole model. part_s_per_element: of a rank's part of masters.
    processes: side by side; threads: of each; cores: that may be used. small_s, exchange_s, bulk_bytes_per_s: of sums
    that go round a ring, of those that do not, and of many bytes, among collective_ranks; 0 for one rank."""

    tokens: int
    clock: Clock
    micro_batch_s: float
    fixed_s: float
    update_s: float
    snapshot_s: float
    digests_s: float
    finite_s: float
    part_s_per_element: float
    peak_flops_per_s: float
    write_bytes_per_s: float
    threads: float
    processes: int
    cores: int
    collective_ranks: int = 1
    small_s: float = 0.0
    exchange_s: float = 0.0
    bulk_bytes_per_s: float = 0.0


def time_machine(
    layout: ZeroLayout, work: Workload, ranks_per_node: int, folder: Path, clock: Clock = "wall"
) -> Timings:
    """Take the timings: up to a minute and a half. folder: on the disk that runs are written to; it is left as it was.
    clock: "cpu" for seconds of each process, which do not depend on who else is at work here.

    Raises DsbertError where the processes fail; they have said why.
    """
    recipe = layout.size.recipe
    lengths = work.micro_lengths()
    rows = max(1, min(len(lengths), int(_MOST_TOKENS / work.samples.mean)))
    lengths = work.samples.typical(rows)
    request = {
        "recipe": recipe.model_dump(mode="json"),
        "vocab_size": layout.size.vocab_size,
        "lengths": lengths.tolist(),
        "clock": clock,
        "bulk_bytes": round(max((m.handed_bytes for m in step_messages(layout, work) if m.bulk), default=0)),
    }
    cores = usable_cores()
    side_by_side = min(ranks_per_node, cores)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".dsbert-plan-") as own:
        found = _run("steps", request | {"folder": own}, side_by_side, Path(own))
        mean = {name: statistics.mean(one[name] for one in found) for name in found[0]}
        ranks = max(2, min(ranks_per_node, _MOST_RANKS)) if layout.ranks > 1 else 1
        if ranks > 1:
            sent = _run("collectives", request, ranks, Path(own))
            mean |= {name: statistics.mean(one[name] for one in sent) for name in sent[0]}
    return Timings(
        tokens=int(lengths.sum()), clock=clock, processes=side_by_side, cores=cores, collective_ranks=ranks, **mean
    )  # fmt: skip


def _run(what: str, request: dict[str, Any], count: int, folder: Path) -> list[dict[str, float]]:
    path = folder / f"{what}.request.json"
    path.write_text(json.dumps(request))
    results = folder / what
    results.mkdir()
    code = launch(module_command("dsbert.jobs.capacity.timing_worker", what, str(path), str(results)), count)
    if code:
        raise DsbertError(f"expected to take a few steps on this machine, found processes that ended with {code}")
    return [json.loads((results / f"{rank}.json").read_text()) for rank in range(count)]


def costs_here(timings: Timings, layout: ZeroLayout, work: Workload, ranks_per_node: int) -> Costs:
    """Of a rank, from what was timed."""
    alone = ZeroLayout(layout.size, layout.config, 1)
    crowd = max(1.0, ranks_per_node / timings.processes) if timings.clock == "wall" else 1.0
    tokens = int(work.micro_lengths().sum())
    micro_s = timings.micro_batch_s * tokens / timings.tokens * crowd
    spared = timings.part_s_per_element * (alone.partition_numel - layout.partition_numel)
    fixed_s = max(0.0, timings.fixed_s - spared) * crowd
    share = "" if crowd == 1 else f", {ranks_per_node} ranks on {timings.cores} cores"
    step = (
        Figure(
            "forward and backward", work.accumulation_steps * micro_s, "s", "measured",
            f"{work.accumulation_steps} micro-batches as timed here{share}",
        ),
        Figure(
            "optimizer and copies", fixed_s, "s", "measured",
            f"timed here on one rank, less what others do of N = {layout.numel:,}{share}",
        ),
        *_wires(timings, layout, work, ranks_per_node),
    )  # fmt: skip
    rounds = -(-layout.size.recipe.eval.sequences // (work.micro_batch * work.ranks))
    scores_s = sum(_seconds(timings, message, layout.ranks, ranks_per_node) for message in update_messages(layout))
    part = layout.owned_numel / layout.numel
    save_s = (timings.snapshot_s * part + timings.digests_s + timings.finite_s * part) * crowd
    publish_s = 12 * layout.owned_numel * ranks_per_node / timings.processes / timings.write_bytes_per_s
    return Costs(
        step,
        Figure("validation", rounds * micro_s / 3, "s", "estimated", f"a third of a micro-batch, {rounds} times"),
        Figure("mask update", timings.update_s * crowd + scores_s, "s", "measured", "timed here, and what is sent"),
        Figure("training waits at a save", save_s, "s", "measured", "digests of weights, copy of a rank's part"),
        Figure("published after", publish_s, "s", "measured", "a rank's file written, synced and read back, as timed"),
        Figure(
            "peak", timings.peak_flops_per_s / crowd, "FLOP/s", "measured",
            f"fp32, a product of 1024 x 1024 matrices on {timings.threads:g} threads{share}",
        ),
    )  # fmt: skip


def _wires(timings: Timings, layout: ZeroLayout, work: Workload, ranks_per_node: int) -> Iterator[Figure]:
    for message in step_messages(layout, work):
        seconds = _seconds(timings, message, layout.ranks, ranks_per_node)
        known = layout.ranks == timings.collective_ranks == ranks_per_node
        kind: Kind = "measured" if known else "estimated"
        how = f"{message.collective} on loopback, as timed with {timings.collective_ranks} ranks"
        if not known:
            how += f"; between machines at most {_NETWORK_BYTES_PER_S:.3g} bytes/s"
        yield Figure(f"{message.what} on the wire", seconds, "s", kind, how)


def _seconds(timings: Timings, message: Message, ranks: int, ranks_per_node: int) -> float:
    """Latencies grow with the ring, or with the rounds of an exchange; bytes are the machine's to move: all its ranks
    share that."""
    timed = timings.collective_ranks
    if ranks == 1 or timed == 1:
        return 0.0
    if message.collective == "exchange":
        call_s = timings.exchange_s * math.ceil(math.log2(ranks)) / math.ceil(math.log2(timed))
    else:
        call_s = timings.small_s * (ranks - 1) / (timed - 1)
    rate = timings.bulk_bytes_per_s
    if ranks > ranks_per_node:
        rate = min(rate, _NETWORK_BYTES_PER_S)
    return message.wire_bytes(ranks) / rate + message.calls * call_s
