import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsbert.sparse import SparsityConfig, UpdateSchedule


@st.composite
def runs(draw):
    total_steps = draw(st.integers(1, 400))
    return total_steps, draw(st.integers(1, total_steps))


@settings(max_examples=80, deadline=None)
@given(run=runs())
def test_update_u_is_at_round_u_t_over_n(run):
    total_steps, num_updates = run
    schedule = UpdateSchedule(total_steps, num_updates, 0.5)
    expected = {round(Fraction(u * total_steps, num_updates)): u for u in range(1, num_updates)}
    assert len(expected) == num_updates - 1  # no two on one step
    found = {step: schedule.update_number(step) for step in range(-1, total_steps + 2)}
    assert {step: u for step, u in found.items() if u is not None} == expected
    assert [schedule.is_update_step(step) for step in found] == [step in expected for step in found]


def test_the_papers_run():
    schedule = UpdateSchedule(757_000, 80, 0.5)
    steps = [round(Fraction(u * 757_000, 80)) for u in range(1, 80)]
    assert steps[:2] == [9462, 18925]
    assert [schedule.update_number(step) for step in steps] == list(range(1, 80))
    assert not any(schedule.is_update_step(step + shift) for step in steps for shift in (-1, 1))


def test_cosine():
    schedule = UpdateSchedule(1000, 10, 0.5)
    assert schedule.prune_ratio(0) == 0.5
    assert schedule.prune_ratio(250) == pytest.approx(0.5 * (2 + math.sqrt(2)) / 4)
    assert schedule.prune_ratio(500) == pytest.approx(0.25)
    assert schedule.prune_ratio(1000) == pytest.approx(0)
    assert [schedule.num_pruned(step, 100) for step in (100, 500, 900)] == [49, 25, 1]


def test_constant():
    schedule = UpdateSchedule(1000, 10, 0.3, "constant")
    assert {schedule.prune_ratio(step) for step in range(1000)} == {0.3}
    assert schedule.num_pruned(900, 415) == round(0.3 * 415)


@pytest.mark.parametrize("num_updates", [0, -1, 11])
def test_refuses_more_updates_than_steps(num_updates):
    with pytest.raises(ValueError, match=f"expected 1 to 10 pattern updates, found {num_updates}"):
        UpdateSchedule(10, num_updates, 0.5)


def test_refuses_an_unknown_kind():
    with pytest.raises(ValueError, match="expected a schedule cosine or constant, found 'linear'"):
        UpdateSchedule(10, 2, 0.5, "linear")


@settings(max_examples=80, deadline=None)
@given(run=runs(), window=st.sampled_from([(0, 1), (0, 0.75), (0.25, 1), (0.125, 0.875)]))
def test_updates_fall_in_a_part_of_the_run(run, window):
    total_steps, num_updates = run
    begin, end = (Fraction(one) for one in window)
    num_updates = min(num_updates, int((end - begin) * total_steps))
    if num_updates < 1:
        return
    exact = [(begin + (end - begin) * Fraction(u, num_updates)) * total_steps for u in range(1, num_updates)]
    if len({round(step) for step in exact}) < len(exact):
        with pytest.raises(ValueError, match="two of them on one step"):
            UpdateSchedule(total_steps, num_updates, 0.5, begin=float(begin), end=float(end))
        return
    schedule = UpdateSchedule(total_steps, num_updates, 0.5, begin=float(begin), end=float(end))
    found = [step for step in range(total_steps + 1) if schedule.is_update_step(step)]
    assert found == [round(step) for step in exact]
    for step in found:
        passed = (step / total_steps - float(begin)) / float(end - begin)
        assert schedule.prune_ratio(step) == pytest.approx(0.25 * (1 + math.cos(math.pi * passed)))


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"update_every_steps": 100}, list(range(100, 1000, 100))),
        ({"update_every_steps": 100, "update_until": 0.5}, [100, 200, 300, 400]),
        ({"update_every_steps": 50, "update_from": 0.8, "update_until": 1.0}, [850, 900, 950]),
        ({"num_updates": 4, "update_from": 0.2, "update_until": 0.6}, [300, 400, 500]),
    ],
)
def test_a_configuration_says_when(options, steps):
    schedule = UpdateSchedule.of(SparsityConfig(**options), 1000)
    assert [step for step in range(1001) if schedule.is_update_step(step)] == steps
