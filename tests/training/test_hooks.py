"""What happens after a step, and that a further hook is a class and a line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.commands import SMALL, dsbert
from tests.helpers import run_distributed


@pytest.fixture(scope="module")
def hooked(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    run_dir = tmp_path_factory.mktemp("hooked") / "run"
    return run_dir, run_distributed(train_with_another_hook, 2, {"data": str(data), "run_dir": str(run_dir)})


def train_with_another_hook(data: str, run_dir: str) -> list[Any]:
    """What the hook has seen on this rank; it ends the run after step 9."""
    from dsbert.base.errors import UserError
    from dsbert.training import pretrain
    from dsbert.training.hooks import StepContext, after_step_hooks

    seen: list[Any] = []

    @dataclass(frozen=True)
    class Watch:
        run: Any

        def after_step(self, context: StepContext) -> None:
            validated, updated = context.validation is not None, context.update is not None
            seen.append([context.step, validated, updated, self.run.writer.in_flight])
            if context.step == 9:
                raise UserError("enough, says the hook").for_all()

    hooks = after_step_hooks
    with mock.patch.object(pretrain, "after_step_hooks", lambda run, stop: (*hooks(run, stop), Watch(run))):
        done = dsbert("pretrain", "demo", "--run-dir", run_dir, f"data.path={data}", *SMALL)
    return [done.returncode, done.stderr, seen]


def test_a_further_hook_sees_what_those_before_it_have_done(hooked: tuple[Path, list[Any]]) -> None:
    run_dir, ranks = hooked
    for _, _, seen in ranks:
        assert [step for step, *_ in seen] == list(range(1, 10))
        assert [step for step, validated, _, _ in seen if validated] == [6], "eval.every_steps"
        assert [step for step, _, updated, _ in seen if updated] == [3, 6, 9]
        assert seen[5][3], "the hook comes behind the one that saves"
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in metrics] == list(range(1, 10)), "and behind the one that reports"


def test_what_a_hook_raises_ends_the_run_and_is_accounted_for(hooked: tuple[Path, list[Any]]) -> None:
    run_dir, ranks = hooked
    assert [code for code, *_ in ranks] == [2, 2]
    assert sum(said.count("dsbert: enough, says the hook") for _, said, _ in ranks) == 1
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["outcome"], status["step"], status["cause"]) == ("failed", 9, "enough, says the hook")


def test_the_order_is_one_tuple() -> None:
    """Masks before validation, which sees them; records before the save that relies on them."""
    from dsbert.cluster.signals import StopRequest
    from dsbert.training.hooks import after_step_hooks

    names = [type(hook).__name__ for hook in after_step_hooks(mock.Mock(), StopRequest())]
    assert names == [
        *("PublishCheckpoint", "UpdateMasks", "Validate", "AssertOwner", "Report", "CompareWeights", "AssertSound"),
        "SaveCheckpoint",
    ]
