"""Seconds of a card by its data sheet, and of this machine by what was timed: the parts that can be checked by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dsbert.config.recipe import load_recipe
from dsbert.engine.ds_config import load_ds_config
from dsbert.jobs.capacity.card_time import costs_on_card
from dsbert.jobs.capacity.cards import CARDS
from dsbert.jobs.capacity.costs import Costs, StepFlops, utilisation
from dsbert.jobs.capacity.machine_timing import Timings, costs_here
from dsbert.jobs.capacity.model_size import ModelSize
from dsbert.jobs.capacity.workload import Samples, Workload
from dsbert.jobs.capacity.zero_layout import ZeroLayout

LENGTHS = np.array([64, 96, 128])
TIMED = Timings(
    tokens=3072, clock="wall", micro_batch_s=0.5, fixed_s=0.1, update_s=0.02, snapshot_s=0.01, digests_s=0.01,
    finite_s=0.01, part_s_per_element=1e-9, peak_flops_per_s=1e11, write_bytes_per_s=1e8, threads=1.0, processes=2,
    cores=2, collective_ranks=2, small_s=1e-4, exchange_s=1e-4, bulk_bytes_per_s=1e9,
)  # fmt: skip


def case(ranks: int, *overrides: str) -> tuple[ZeroLayout, Workload]:
    recipe = load_recipe("bert-base", ("data.path=unused", *overrides))
    work = Workload.of(recipe, ranks, Samples(LENGTHS, None, 30522, "measured", ""))
    on_ranks = recipe.model_copy(update={"batch": recipe.batch.on_ranks(ranks)})
    config = load_ds_config(on_ranks, ranks, work.accumulation_steps)
    return ZeroLayout(ModelSize.of(recipe, 30522), config, ranks), work


def seconds(costs: Costs, name: str) -> float:
    (found,) = [figure.value for figure in costs.step if figure.name == name]
    return found


def test_products_take_their_flops_over_the_share_of_the_peak() -> None:
    layout, work = case(16)
    card = CARDS["a100"]
    costs = costs_on_card(card, layout, work, 8)
    # 32 sequences of 96 tokens on average; BERT-Base keeps 8,491,008 weights in blocks of 16 (33,168 of them).
    flops = 6 * 32 * 96 * 33_168 * 256
    assert seconds(costs, "sparse products") == pytest.approx(flops / (card.sparse_share * 312e12), rel=0.01)
    assert costs.step_s.value == pytest.approx(sum(figure.value for figure in costs.step))
    better = card.model_copy(update={"sparse_share": 2 * card.sparse_share})
    assert seconds(costs_on_card(better, layout, work, 8), "sparse products") == pytest.approx(
        seconds(costs, "sparse products") / 2
    )


def test_utilisation_of_products_alone_is_their_share() -> None:
    layout, work = case(16, "sparsity.pattern=dense")
    flops = StepFlops.of(layout.size, work)
    assert flops.paper == flops.dense
    costs = costs_on_card(CARDS["h100"], layout, work, 8)
    assert utilisation(flops, flops.dense / (16 * 0.5 * 989.4e12), 16, costs.peak).value == pytest.approx(0.5)


def test_wires_between_nodes_are_slower_than_inside() -> None:
    card = CARDS["h100"].model_copy(update={"network_bytes_per_s": 5e9})
    layout, work = case(8)
    inside, across = costs_on_card(card, layout, work, 8), costs_on_card(card, layout, work, 4)
    bits = seconds(across, "gradients on the wire") / seconds(inside, "gradients on the wire")
    assert 5 < bits <= 450 / 20
    alone = case(1)
    assert seconds(costs_on_card(card, *alone, 1), "gradients on the wire") == 0


def test_ranks_that_share_cores_take_turns() -> None:
    layout, work = case(2)
    few = costs_here(TIMED, layout, work, 2)
    tokens = 32 * 96
    assert seconds(few, "forward and backward") == pytest.approx(8 * 0.5 * tokens / 3072)
    # Half of N is another rank's, to the last element that pads.
    assert seconds(few, "optimizer and copies") == pytest.approx(0.1 - 1e-9 * layout.numel / 2, rel=1e-3)
    layout, work = case(4)
    many = costs_here(TIMED, layout, work, 4)
    assert seconds(many, "forward and backward") == pytest.approx(2 * 4 * 0.5 * tokens / 3072)
    by_processor = costs_here(dataclasses.replace(TIMED, clock="cpu"), layout, work, 4)
    assert seconds(by_processor, "forward and backward") == pytest.approx(4 * 0.5 * tokens / 3072)


def test_what_is_sent_takes_its_bytes_over_the_rate() -> None:
    layout, work = case(2)
    sent = 2 * layout.numel  # bf16, 2 (W - 1)/W of it
    found = seconds(costs_here(TIMED, layout, work, 2), "gradients on the wire")
    assert found == pytest.approx(sent / 1e9 + 1e-4)
    kinds = {figure.kind for figure in costs_here(TIMED, layout, work, 2).step}
    assert kinds == {"measured"}
    apart = costs_here(TIMED, layout, work, 1)
    assert {figure.kind for figure in apart.step if figure.name.endswith("wire")} == {"estimated"}


def test_ranks_without_samples_are_counted() -> None:
    recipe = load_recipe("bert-base", ("data.path=unused", "batch.global_batch=36", "batch.micro_batch=8"))
    work = Workload.of(recipe, 4, Samples(LENGTHS, None, 30522, "measured", ""))
    # Five micro-batches of 8, the last of 4, over four ranks of two each: three of eight are empty.
    assert (work.accumulation_steps, work.without_samples, work.room) == (2, 3, 64)
