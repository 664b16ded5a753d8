"""What ranks tell each other of a step is under way while it goes forward, and holds for that same step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tests.helpers import run_distributed


def told(directory: str) -> list[Any]:
    """Two steps; rank 1 begins each only when rank 0 has gone forward, and asks in the second to stop. Returns
    what the steps say."""
    from tests import workbench as bench

    world, forwards = bench.world(), Path(directory) / "forwards"
    engine, _ = bench.engine_and_masks(bench.recipe(batch={"global_batch": 4, "micro_batch": 2}), world)
    source, said, steps = bench.stream(), [], 2

    def went_forward(*_: Any) -> None:
        with forwards.open("a") as file:
            file.write("x")

    if world.rank == 0:
        engine.deepspeed_engine.module.register_forward_hook(went_forward)
    for step in range(steps):
        batches = bench.step_batches(engine, source, step)
        deadline = time.monotonic() + 30
        while world.rank == 1 and not (forwards.exists() and len(forwards.read_text()) > step):
            assert time.monotonic() < deadline, "rank 0 waits for what rank 1 tells before it goes forward"
            time.sleep(0.01)
        result = engine.train_step(batches, stop=bool(step and world.rank), busy=not step and not world.rank)
        assert result.own_times is not None
        assert result.own_times.shape == (2, 4)
        assert bool(result.own_times[:, :3].any(1).all()) == bool(step), "before the first step there was none"
        flags = [result.stop, result.busy, result.own_times[:, 3].tolist()]
        said.append([result.counts, result.tokens, result.positions, result.pairs, result.losses.tolist(), *flags])
    return said


def test_nobody_waits_for_the_message_before_going_forward(tmp_path: Path) -> None:
    first, second = run_distributed(told, 2, {"directory": str(tmp_path)})
    assert first == second
    assert [step[-3:] for step in first] == [[False, True, [1, 0]], [True, False, [0, 0]]]
