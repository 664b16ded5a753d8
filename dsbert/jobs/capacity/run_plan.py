"""`dsbert plan`: what a run will need and take, and whether it can begin, from the recipe and the machines it is to
have."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dsbert.config.recipe import Recipe
from dsbert.engine.ds_config import load_ds_config, what_holds
from dsbert.jobs.capacity.card_time import costs_on_card
from dsbert.jobs.capacity.cards import CPU, Card, load_card
from dsbert.jobs.capacity.costs import Costs, StepFlops, utilisation
from dsbert.jobs.capacity.figures import Figure, Part, least_sure
from dsbert.jobs.capacity.goodput import Failures
from dsbert.jobs.capacity.model_size import ModelSize
from dsbert.jobs.capacity.rank_memory import largest_micro_batch, needed_bytes, rank_memory
from dsbert.jobs.capacity.wire_traffic import traffic
from dsbert.jobs.capacity.workload import Workload, read_samples
from dsbert.jobs.capacity.zero_layout import ZeroLayout
from dsbert.jobs.job_queue import Finding, TaskRun, look_at
from dsbert.sparse.schedule import UpdateSchedule
from dsbert.training.preflight import frozen

# 419 unexpected interruptions in 54 days on 2,048 nodes of 8 H100s (Llama 3, arXiv:2407.21783, section 3.3.4).
NODE_MTBF_H = 6300.0
_HEADER_BYTES = 450  # of safetensors, for master and moments of a parameter


@dataclass(frozen=True)
class Question:
    """nodes, ranks_per_node: what the run is to have. card: a name of `CARDS`, a file, or "cpu": this machine, timed.
    mtbf_h: mean hours between failures of one node. restart_s: from a failure to the next step: requeued, started,
    loaded. vocab_size: where it is not the data's. clock: of timings, as in machine_timing.py."""

    recipe: Recipe
    nodes: int
    ranks_per_node: int
    run_dir: Path
    card: str = "h100"
    mtbf_h: float = NODE_MTBF_H
    restart_s: float = 300.0
    vocab_size: int | None = None
    clock: Literal["wall", "cpu"] = "wall"

    @property
    def ranks(self) -> int:
        """W."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Check:
    """verdict: fail, where the run could not begin or would end at once."""

    about: str
    verdict: Literal["ok", "fail"]
    text: str


@dataclass(frozen=True)
class Plan:
    """What `make_plan` found. heading: recipe and machines in a line."""

    heading: str
    checks: tuple[Check, ...]
    parts: tuple[Part, ...]

    @property
    def can_work(self) -> bool:
        """Whether no check has failed."""
        return all(check.verdict == "ok" for check in self.checks)

    def __getitem__(self, name: str) -> Part:
        """Raises KeyError."""
        for part in self.parts:
            if part.name == name:
                return part
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        """As --json has it."""
        checks = [{"about": check.about, "verdict": check.verdict, "text": check.text} for check in self.checks]
        parts = {part.name: part.to_json() for part in self.parts}
        return {"plan": self.heading, "can_work": self.can_work, "checks": checks, **parts}


def make_plan(asked: Question) -> Plan:
    """All of it. Raises UserError for a recipe, a card or an override that cannot be planned with, such as more ranks
    than samples."""
    recipe, ranks = frozen(asked.recipe), asked.ranks
    samples = read_samples(recipe, asked.vocab_size)
    work = Workload.of(recipe, ranks, samples)
    on_ranks = recipe.model_copy(update={"batch": recipe.batch.on_ranks(ranks)})
    config = load_ds_config(on_ranks, ranks, work.accumulation_steps)
    layout = ZeroLayout(ModelSize.of(recipe, samples.vocab_size), config, ranks)
    card = None if asked.card == CPU else load_card(asked.card)
    memory, fit = _memory(layout, work, card, asked.ranks_per_node)
    checks = (*_checks(look_at(asked.run_dir, TaskRun(recipe)).findings), fit)
    costs = _costs(layout, work, card, asked)
    flops = StepFlops.of(layout.size, work)
    time = _time(layout, work, costs, flops)
    saves = _saves(layout, costs)
    run = _run(asked, layout, work, time, saves)
    step = _step(work, flops)
    heading = (
        f"{recipe.name} on {asked.nodes} x {asked.ranks_per_node} ranks, {card.name if card else 'this CPU'}; "
        f"{layout.numel:,} parameters, {layout.size.kept:,} in the encoder's products; {what_holds(recipe, config)}"
    )
    return Plan(heading, checks, (memory, step, traffic(layout, work), time, saves, run))


def _checks(findings: tuple[Finding, ...]) -> Iterator[Check]:
    for finding in findings:
        yield Check(finding.about, "fail" if finding.error else "ok", str(finding.error or "as a job needs it"))


def _memory(layout: ZeroLayout, work: Workload, card: Card | None, ranks_per_node: int) -> tuple[Part, Check]:
    from dsbert.sparse.half_precision import multiplies

    on_card = card is not None
    widened = not on_card and not multiplies(_torch_dtype(layout.precision))
    there = card.memory_bytes if card else _memory_here() / ranks_per_node
    found = rank_memory(layout, work, on_card=on_card, widened=widened)
    needed = needed_bytes(found, on_card=on_card)
    largest = largest_micro_batch(layout, work, there, on_card=on_card, widened=widened)
    of = f"of {there / 1e9:.1f} GB" + ("" if on_card else f", a share of {ranks_per_node} ranks")
    figures = (
        *found.figures,
        Figure("needed", needed, "bytes", "estimated", f"the fullest and a tenth, and process, {of}"),
        Figure("micro-batch that fits", largest, "", "estimated", "the largest, up to a rank's share of a step"),
    )
    text = f"{needed / 1e9:.2f} GB {of} with batch.micro_batch={work.micro_batch}"
    if needed > there:
        text += (
            f": lower it to {largest}" if largest else ": more ranks, a higher ZeRO stage, or activation checkpointing"
        )
    return Part(found.name, figures), Check("memory", "ok" if needed <= there else "fail", text)


def _costs(layout: ZeroLayout, work: Workload, card: Card | None, asked: Question) -> Costs:
    if card is not None:
        return costs_on_card(card, layout, work, asked.ranks_per_node)
    from dsbert.jobs.capacity.machine_timing import costs_here, time_machine

    folder = next(path for path in (asked.run_dir.absolute(), *asked.run_dir.absolute().parents) if path.is_dir())
    timings = time_machine(layout, work, asked.ranks_per_node, folder, asked.clock)
    return costs_here(timings, layout, work, asked.ranks_per_node)


def _step(work: Workload, flops: StepFlops) -> Part:
    samples = work.samples
    of = f"{work.ranks} ranks x {work.accumulation_steps} micro-batches"
    figures = [
        Figure("samples", work.global_batch, "", "computed", "batch.global_batch"),
        Figure(
            "samples of a micro-batch", work.micro_batch, "", "computed", "batch.micro_batch, where ranks have as many"
        ),
        Figure(
            "micro-batches of a rank", work.accumulation_steps, "", "computed", "gradients are accumulated over them"
        ),
        Figure("micro-batches without samples", work.without_samples, "", "computed", f"of {of}"),
        Figure("room that is empty", 1 - work.global_batch / work.room, "share", "computed", f"of {of}"),
        Figure("tokens", work.tokens, "tokens", samples.kind, f"{samples.mean:.1f} a sample: {samples.how}"),
        Figure("model FLOPs", flops.paper, "FLOP", "computed", "the paper's: kept weights and attention, real tokens"),
        Figure("model FLOPs, dense", flops.dense, "FLOP", "computed", "the same with every weight"),
        Figure("head FLOPs", flops.head, "FLOP", "computed", "prediction of masked tokens, beside the paper's"),
    ]
    if samples.count:
        how = f"global batches of {samples.count:,} samples"
        figures.append(Figure("steps of an epoch", samples.count / work.global_batch, "steps", samples.kind, how))
    return Part("a step", tuple(figures))


def _time(layout: ZeroLayout, work: Workload, costs: Costs, flops: StepFlops) -> Part:
    step = costs.step_s
    rate = Figure("tokens/s", work.tokens / step.value, "tokens/s", step.kind, "tokens of a step / its seconds")
    mfu = utilisation(flops, step.value, layout.ranks, costs.peak)
    return Part("time", (*costs.step, step, rate, costs.peak, mfu, costs.update, costs.evaluation))


def _saves(layout: ZeroLayout, costs: Costs) -> Part:
    fresh = layout.size.recipe.sparsity.fresh_moments
    topology = sum(layer.state_bytes(fresh) for layer in layout.size.layers.values())
    heads = _HEADER_BYTES * len(layout.size.parameters)
    size = 12 * layout.numel + topology + heads
    how = "12 bytes a parameter, and the topology; without the tokenizer"
    return Part("saves", (Figure("checkpoint", size, "bytes", "computed", how), costs.save, costs.publish))


def _run(asked: Question, layout: ZeroLayout, work: Workload, time: Part, saves: Part) -> Part:
    """Hours, and what failures make of them."""
    recipe, steps = layout.size.recipe, layout.size.recipe.optim.total_steps
    updates = _num_updates(recipe)
    validations = -(-steps // recipe.eval.every_steps) if recipe.eval.sequences else 0
    training_s = (
        steps * time["step"].value + updates * time["mask update"].value + validations * time["validation"].value
    )
    step_s = training_s / steps
    mtbf_s = asked.mtbf_h * 3600 / asked.nodes
    failures = Failures(
        mtbf_s, asked.restart_s, saves["training waits at a save"].value, saves["published after"].value
    )
    every = recipe.checkpoint.every_steps
    wall_s = failures.wall_s(training_s, every * step_s)
    undisturbed_s = training_s + -(-steps // every) * failures.save_s
    best_s = max(failures.daly_s, failures.publish_s)
    best = min(steps, max(1, round(best_s / step_s))) if math.isfinite(best_s) else steps
    kind = least_sure((*time.figures, *saves.figures))
    rate = f"a failure of a node every {asked.mtbf_h:g} h, {asked.nodes} nodes"
    daly = (
        f"Daly's sqrt(2 delta M)(1 + ...) - delta; Young's: {failures.young_s / step_s:,.0f} steps; recipe: {every:,}"
    )
    figures = [
        Figure("steps", steps, "steps", "computed", f"optim.total_steps, with {updates} mask updates"),
        Figure("hours without failures", undisturbed_s / 3600, "h", kind, "steps, updates, validations and saves"),
        Figure(
            "hours", wall_s / 3600, "h", "estimated", f"Daly's expected wall time: {rate}, {asked.restart_s:g} s each"
        ),
        Figure("GPU-hours", wall_s / 3600 * asked.ranks, "h", "estimated", f"hours x {asked.ranks} ranks"),
        Figure("interruptions", failures.interruptions(wall_s), "", "estimated", f"hours / M: {rate}"),
        Figure("goodput", training_s / wall_s, "share", "estimated", "seconds of steps that count / all seconds"),
        Figure("best save interval", best, "steps", "estimated", daly),
        Figure(
            "goodput at it", training_s / failures.wall_s(training_s, best * step_s), "share", "estimated", "likewise"
        ),
    ]
    if work.samples.count:
        epochs = steps * work.global_batch / work.samples.count
        figures.insert(1, Figure("epochs", epochs, "", work.samples.kind, f"of {work.samples.count:,} samples"))
    return Part("the run", tuple(figures))


def _num_updates(recipe: Recipe) -> int:
    if recipe.sparsity.pattern != "dynamic":
        return 0
    return UpdateSchedule.of(recipe.sparsity, recipe.optim.total_steps).num_updates - 1


def _memory_here() -> float:
    """Bytes of this machine."""
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _torch_dtype(precision: str) -> Any:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
