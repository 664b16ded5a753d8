"""A loss or a gradient that is not finite, on one rank, in one micro-batch: the step is skipped on every rank, moves no
bit, and leaves nothing behind. The truth to compare with is a run that never took the step: the same engine with its
step counter moved on.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import run_distributed

STEPS = 12
# Step -> what goes wrong in it: before Adam has any state, in the step of a mask update, twice in a row; five clean
# steps follow.
FAULTS = {1: "loss", 4: "gradient", 6: "loss alone", 7: "sum"}
FAULTY_RANK = 1
# A faulty sum is nobody's: the guard must see it all the same, but may not accuse a rank.
NAMED = {"loss": [FAULTY_RANK], "gradient": [FAULTY_RANK], "loss alone": [FAULTY_RANK], "sum": []}


class Saboteur:
    """Spoils the last micro-batch but one of the steps in `faults`, on one rank.

    loss: NaN, and so are the gradients. loss alone: NaN, with finite gradients. gradient: Inf in one element of one
    parameter's, with a finite loss. sum: the same where the guard does not see it, as if the ranks' sum overflowed.
    """

    def __init__(self, model: Any, rank: int, accumulation_steps: int, faults: dict[int, str]) -> None:
        self.faults = faults if rank == FAULTY_RANK else {}
        self.accumulation_steps, self.forwards = accumulation_steps, 0
        self.victim = next(param for name, param in model.named_parameters() if name.endswith("blocks"))
        model.register_forward_hook(self._spoil_loss)
        self.spoil_gradients_in("gradient")

    def spoil_gradients_in(self, kind: str) -> None:
        """Hooks run in the order in which they are registered."""

        def spoil(gradient: Any) -> Any:
            if self._fault() != kind:
                return None
            gradient = gradient.clone()
            gradient.view(-1)[gradient.numel() // 2] = math.inf
            return gradient

        self.victim.register_hook(spoil)

    def _fault(self) -> str | None:
        """In the micro-batch in hand."""
        step, micro = divmod(self.forwards - 1, self.accumulation_steps)
        return self.faults.get(step + 1) if micro == self.accumulation_steps - 2 else None

    def _spoil_loss(self, model: Any, inputs: Any, outputs: Any) -> Any:
        self.forwards += 1
        losses, hits = outputs
        if self._fault() == "loss":
            return losses * math.nan, hits
        return (losses + math.nan if self._fault() == "loss alone" else losses), hits


def train(recipe: Any, world: Any, faults: dict[int, str], *, take_them: bool) -> tuple[list[Any], list[Any], Any]:
    """Train STEPS steps. take_them: with `faults` in them; else the steps with faults are not taken, only counted.
    Returns what the rank holds after each step, what the steps said, and the engine."""
    from dsbert.base import collectives
    from dsbert.engine.train_engine import TrainEngine
    from dsbert.engine.zero_shards import adam_step
    from dsbert.models.construction import build_model
    from dsbert.sparse import MaskManager
    from tests import workbench as bench

    model, layers = build_model(recipe, bench.VOCAB_SIZE)
    accumulation_steps = recipe.batch.global_batch // (recipe.batch.micro_batch * world.world_size)
    saboteur = Saboteur(model, world.rank, accumulation_steps, faults if take_them else {})
    engine = TrainEngine(recipe, model, layers, world)
    assert engine.accumulation_steps == accumulation_steps > 1
    saboteur.spoil_gradients_in("sum")
    masks = MaskManager(layers, recipe.sparsity, total_steps=recipe.optim.total_steps, editor=engine, seed=recipe.seed)
    source, held = bench.stream(), []
    said: list[Any] = []
    for step in range(1, STEPS + 1):
        before, applied = bench.held_elements(engine), adam_step(engine.deepspeed_engine)
        if step in faults and not take_them:
            engine.step += 1
        else:
            result = engine.train_step(bench.step_batches(engine, source, step - 1))
            assert result.skipped == (step in faults), f"step {step}"
            said.append([result.mean_losses(), result.grad_norm, list(result.nonfinite_ranks)])
        after = bench.held_elements(engine)
        if step in faults:
            assert_same_bits(before, after, f"skipped step {step}")
            assert adam_step(engine.deepspeed_engine) == applied
        assert all(param.grad is None for param in engine.parameters.values())
        update = masks.maybe_update(step)
        if update:
            bench.check_update(engine, after, update)
        masks.verify_replicas()
        collectives.assert_replicas_agree("the weights", engine.replica_digests())
        held.append(bench.held_elements(engine))
    assert adam_step(engine.deepspeed_engine) == STEPS - len(faults)
    if take_them:
        counters, total = engine.deepspeed_engine, recipe.batch.global_batch
        assert (counters.global_steps, counters.global_samples) == (STEPS, STEPS * total)
        assert (counters.micro_steps, counters.skipped_steps) == (STEPS * accumulation_steps, len(faults))
    said.append(masks.digest())
    return held, said, engine


def assert_same_bits(expected: dict[str, Any], found: dict[str, Any], where: str) -> None:
    """Of two results of workbench.held_elements."""
    import torch

    for name, tensors in expected.items():
        # Stage 3 keeps small parameters gathered, but only from the first forward pass on.
        assert (tensors.keys() ^ found[name].keys()) <= {"copy 1"}, (where, name)
        for kind in tensors.keys() & found[name].keys():
            tensor, other = tensors[kind][1], found[name][kind][1]
            # As bytes: NaN would differ from itself, and -0 equal 0.
            assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)), f"{where}: {kind} of {name} differs"


def skip_and_go_on(stage: int, dtype: str, faults: dict[str, str], sections: dict[str, Any]) -> list[Any]:
    """Every step of a run with faults, against the run that leaves those steps out. faults: JSON's keys are text."""
    from dsbert.cluster import process_group
    from tests import workbench as bench

    world = process_group.init(60)
    steps = {int(step): kind for step, kind in faults.items()}
    deepspeed = bench.zero_config(stage, dtype)
    deepspeed["overrides"] |= sections.pop("deepspeed", {})
    recipe = bench.recipe(deepspeed=deepspeed, **sections)
    with_faults, said, _ = train(recipe, world, steps, take_them=True)
    without, expected, _ = train(recipe, world, steps, take_them=False)
    for step, (found, truth) in enumerate(zip(with_faults, without, strict=True), start=1):
        assert_same_bits(truth, found, f"after step {step}")
    clean = [what for step, what in enumerate(said, start=1) if step not in steps]
    assert clean == expected, "the steps between must say the same, too"
    return said


def check(stage: int, dtype: str, faults: dict[int, str] = FAULTS, **sections: Any) -> None:
    args = {"stage": stage, "dtype": dtype, "faults": faults, "sections": sections}
    ranks = run_distributed(skip_and_go_on, 2, args)
    # As text: NaN is not equal to itself.
    assert str(ranks[0]) == str(ranks[1]), "all ranks must say the same"
    for step, kind in faults.items():
        losses, norm, named = ranks[0][step - 1]
        assert named == NAMED[kind]
        assert math.isnan(sum(losses)) == kind.startswith("loss")
        assert math.isfinite(norm) == (kind == "loss alone")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "dtype"),
    [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16")]
    + [pytest.param(stage, "bf16", marks=pytest.mark.exhaustive) for stage in (2, 3)],
)
def test_a_step_that_is_not_finite_is_skipped_everywhere(stage: int, dtype: str) -> None:
    check(stage, dtype, sparsity={"group_lasso": 0.1})


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "dtype"), [(1, "fp32"), pytest.param(3, "bf16", marks=pytest.mark.exhaustive)])
def test_regrowth_by_gradient_is_defined_on_a_step_that_is_skipped(stage: int, dtype: str) -> None:
    """All gradients NaN at the first update: the order is that of no gradient at all, which the other run has."""
    check(stage, dtype, {4: "loss"}, sparsity={"regrow": "gradient"})


@pytest.mark.exhaustive
def test_bf16_that_accumulates_in_fp32() -> None:
    """DeepSpeed has an optimizer of its own for this."""
    check(1, "bf16", deepspeed={"data_types": {"grad_accum_dtype": "fp32"}})


def overflow_in_fp16(stage: int) -> float:
    """The same faults; returns the loss scale in the end."""
    from deepspeed.accelerator import get_accelerator

    from dsbert.cluster import process_group
    from dsbert.engine.zero_shards import loss_scaler
    from tests import workbench as bench

    # Slow on a CPU, but right.
    type(get_accelerator()).is_fp16_supported = lambda self: True
    world = process_group.init(60)
    deepspeed = bench.zero_config(stage, "fp16")
    deepspeed["overrides"]["fp16"] |= {"initial_scale_power": 8, "hysteresis": 1}
    recipe = bench.recipe(deepspeed=deepspeed, sparsity={"group_lasso": 0.1})
    *_, engine = train(recipe, world, FAULTS, take_them=True)
    return loss_scaler(engine.deepspeed_engine)["cur_scale"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1] + [pytest.param(stage, marks=pytest.mark.exhaustive) for stage in (0, 2, 3)])
def test_the_loss_scaler_of_fp16_sees_every_overflow(stage: int) -> None:
    """It halves the scale at each fault but that of the loss alone, which is no overflow."""
    assert run_distributed(overflow_in_fp16, 2, {"stage": stage}) == [2.0**8 / 2**3] * 2


def test_skipped_steps_are_counted_and_logged(tmp_path: Path) -> None:
    import torch

    from dsbert.checkpoint.state import Totals
    from dsbert.cluster.process_group import World
    from dsbert.engine.step_result import StepResult
    from dsbert.sparse import MaskManager
    from dsbert.training.attempts import Attempt
    from dsbert.training.reporting import Reporter, StepReport
    from dsbert.training.run_directory import RunDirectory
    from tests import workbench as bench

    recipe = bench.recipe(log={"every_steps": 10, "wandb": False})
    directory, world = RunDirectory(tmp_path), World(0, 1, 0, torch.device("cpu"), "here")
    masks = MaskManager({}, recipe.sparsity, total_steps=20, editor=None)  # type: ignore[arg-type]
    reporter = Reporter(recipe, directory, world, {})
    # As a checkpoint from before skipped steps were counted.
    (tmp_path / "attempt.json").write_text('{"number": 1, "nonce": "ours"}')
    old = Totals.from_json({"tokens": 5, "flops": 0, "flops_dense": 0})
    reporter.begin(2, old, Attempt(number=1, nonce="ours"))
    in_a_row = []
    for step in range(3, 11):
        losses = torch.full((2,), math.nan if step in (4, 6, 7) else 1.0, dtype=torch.float64)
        skipped = step in (4, 5, 6, 7)
        result = StepResult(losses, (1, 1), 1, 1, 1, 1.0, 1e-3, stop=False, skipped=skipped, rescaled=step == 5)
        reporter.step(StepReport(step, result, masks, None, None))
        in_a_row.append(reporter.totals.skipped_in_a_row)
    reporter.close("failed")
    assert in_a_row == [0, 1, 1, 2, 3, 0, 0, 0], "a step by which the loss scale falls counts neither way"
    assert reporter.totals.skipped == 4
    records = [(record["step"], record["skipped"], record["loss"]) for record in directory.metrics.read()]
    assert records == [(4, 1, None), (5, 1, 2.0), (6, 1, None), (7, 1, None), (10, 0, 2.0)]


def test_how_many_steps_may_be_skipped_is_no_part_of_the_identity() -> None:
    from tests import workbench as bench

    optim = {"total_steps": 20, "warmup_steps": 2, "lr": 1e-3}
    assert bench.recipe().optim.max_skipped_steps == 10
    assert bench.recipe(optim=optim | {"max_skipped_steps": 3}).identity() == bench.recipe().identity()
