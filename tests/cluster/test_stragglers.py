"""Who is slow is named, with the cause, and nobody else."""

from __future__ import annotations

import numpy as np

from dsbert.cluster.stragglers import WINDOW_STEPS, StragglerWatch

HOSTS = ["n1", "n1", "n2", "n2"]
USUAL_MS = (1.0, 90.0, 9.0, 0)  # data, compute, other, and no checkpoint in the making


def step(
    more: dict[int, tuple[float, float, float, int]] | None = None, noise: float = 0.0, seed: int = 0
) -> np.ndarray:
    """Own times of four ranks, in microseconds; `more`: milliseconds that a rank takes longer, phase by phase."""
    times = np.array([USUAL_MS] * len(HOSTS))
    for rank, longer in (more or {}).items():
        times[rank] += longer
    times[:, :3] *= 1 + noise * np.random.default_rng(seed).random((len(HOSTS), 1))
    times[:, :3] *= 1000
    return times.astype(np.int64)


def watch(samples: tuple[int, ...] = (4, 4, 4, 4)) -> StragglerWatch:
    return StragglerWatch(HOSTS, samples)


def test_a_slow_rank_is_named_once_with_host_and_cause() -> None:
    for cause, longer in {
        "data": (30.0, 0.0, 0.0, 0),
        "compute": (0.0, 30.0, 0.0, 0),
        "other": (0.0, 0.0, 30.0, 0),
        "save": (0.0, 30.0, 0.0, 1),
    }.items():
        found = watch()
        said = [found.add(step({2: longer}, noise=0.05, seed=number)) for number in range(60)]
        assert [number for number, lines in enumerate(said) if lines] == [WINDOW_STEPS - 1]
        (line,) = said[WINDOW_STEPS - 1]
        assert "rank 2 on n2 is a straggler" in line
        assert f"cause: {cause} " in line
        assert found.record()["stragglers"] == "2"
        assert found.record()["slowest_cause"] == cause


def test_who_keeps_up_again_is_said_and_may_be_named_anew() -> None:
    found, slow = watch(), {1: (0.0, 40.0, 0.0, 0)}
    said = [line for more in (slow, None, slow) for _ in range(40) for line in found.add(step(more))]
    assert ["is no straggler" in line for line in said] == [False, True, False]
    assert all(line.startswith("rank 1 on n1 ") for line in said)


def test_what_comes_and_goes_is_nobodys_fault() -> None:
    """A rank that is disturbed in three steps of four, one after the other, and one by one step that takes seconds."""
    found = watch()
    rng = np.random.default_rng(1)
    for number in range(500):
        more = {rank: (0.0, 200.0 * rng.random(), 0.0, 0) for rank in range(4) if rng.random() < 0.75}
        if number % 50 == 0:
            more[3] = (0.0, 5000.0, 0.0, 0)
        assert found.add(step(more)) == []


def test_less_than_a_fifth_is_not_said_and_more_is() -> None:
    for longer, lines in ((17.0, 0), (23.0, 1)):
        found = watch()
        assert sum(len(found.add(step({0: (0.0, longer, 0.0, 0)}))) for _ in range(40)) == lines


def test_a_few_steps_that_take_long_do_not_make_a_straggler_of_who_is_a_little_slower() -> None:
    found = watch()
    for number in range(100):
        assert found.add(step({0: (0.0, 300.0 if number % 7 == 0 else 15.0, 0.0, 0)})) == []


def test_who_has_more_to_do_is_compared_with_its_like() -> None:
    """Three of four ranks have two micro-batches: they take twice as long as the last one, and that is right."""
    twice = (0.0, 90.0, 0.0, 0)
    loaded = {0: twice, 1: twice, 2: twice}
    found = watch((4, 4, 4, 2))
    assert not [line for _ in range(40) for line in found.add(step(loaded))]
    found = watch((4, 4, 4, 2))
    (line,) = [line for _ in range(40) for line in found.add(step(loaded | {1: (0.0, 150.0, 0.0, 0)}))]
    assert "rank 1 on n1" in line
    found = watch((4, 2, 2, 2))  # nobody to be compared with
    assert not [line for _ in range(40) for line in found.add(step({0: twice}))]
    found = watch((4, 4, 4, 2))  # half as much to do, and as slow as the others
    (line,) = [line for _ in range(40) for line in found.add(step(loaded | {3: (0.0, 150.0, 0.0, 0)}))]
    assert "rank 3 on n2" in line


def test_of_two_ranks_the_other_is_the_measure() -> None:
    found = StragglerWatch(["n1", "n2"], (4, 4))
    (line,) = [line for _ in range(40) for line in found.add(step({1: (0.0, 25.0, 0.0, 0)})[:2])]
    assert "rank 1 on n2" in line


def test_the_first_step_has_nothing_before_it() -> None:
    found = watch()
    assert found.add(np.zeros((4, 4), np.int64)) == []
    assert found.record()["slowest_rank"] is None
    assert StragglerWatch(["n1"], (4,)).add(step()[:1]) == []
