"""A flipped bit in what one rank computes is found and the rank named; and looking for it changes no bit."""

from __future__ import annotations

from typing import Any

import pytest

from dsbert.engine.replay import wrong_ranks
from tests.helpers import run_distributed

STEPS = 4
FAULTY_RANK = 1
# The forward passes of the first step that a fault is in: first that of the next rank's micro-batch, then the own ones.
PASSES = {"as owner": (1,), "as checker": (0,), "always": tuple(range(100))}
_FLIPPED = 20  # of fp32: in the middle of the mantissa


class Saboteur:
    """Flips a bit of one rank's activations or gradients in some passes. Made before the engine, so that its hooks come
    before others."""

    def __init__(self, model: Any, layers: dict[str, Any], rank: int, what: str, passes: tuple[int, ...]) -> None:
        self.forwards, self.flips = -1, 0
        self.passes = passes if rank == FAULTY_RANK else ()
        model.register_forward_pre_hook(self._count)
        # What a query is off by, softmax and rounding to bf16 can undo; values go on as they are.
        layer = next(layer for name, layer in layers.items() if name.endswith("value"))
        if what == "activation":
            layer.register_forward_hook(lambda module, inputs, output: self._flip(output))
        else:
            layer.blocks.register_hook(self._flip)

    def _count(self, *_: Any) -> None:
        self.forwards += 1

    def _flip(self, tensor: Any) -> Any:
        import torch

        if self.forwards not in self.passes:
            return None
        self.flips += 1
        if isinstance(tensor, tuple):
            return (self._flip(tensor[0]), *tensor[1:])
        flipped = tensor.clone()
        bits, bit = (torch.int32, _FLIPPED) if tensor.dtype == torch.float32 else (torch.int16, _FLIPPED - 16)
        place = int(tensor.detach().abs().argmax())  # where no block is, an activation is 0, and stays as good as that
        flipped.data.view(-1).view(bits)[place] ^= 1 << bit
        return flipped


def train(stage: int, dtype: str, every_steps: int, what: str = "nothing", passes: tuple[int, ...] = ()) -> Any:
    """What a rank holds after STEPS steps, and their losses; or the ranks that a fault is laid at, and what is said."""
    from dsbert.base.errors import PeerError
    from dsbert.engine.train_engine import TrainEngine
    from dsbert.models.construction import build_model
    from dsbert.sparse import MaskManager
    from tests import workbench as bench

    world = bench.world()
    regrow = "gradient" if what == "nothing" else "random"
    recipe = bench.recipe(
        deepspeed=bench.zero_config(stage, dtype), sparsity={"regrow": regrow},
        batch={"global_batch": 4 * world.world_size + 1},
    )  # fmt: skip
    model, layers = build_model(recipe, bench.VOCAB_SIZE)
    saboteur = Saboteur(model, layers, world.rank, what, passes)
    engine = TrainEngine(recipe, model, layers, world)
    masks = MaskManager(layers, recipe.sparsity, total_steps=recipe.optim.total_steps, editor=engine, seed=recipe.seed)
    source, losses = bench.stream(), []
    engine.replay_gradients(every_steps, source.batch)
    before, first = bench.held_elements(engine), bench.step_batches(engine, source, 0)
    if what != "nothing":
        with pytest.raises(PeerError) as raised:
            engine.train_step(first)
        assert raised.value.exit_code == 3
        assert raised.value.shared
        assert bool(saboteur.flips) == (world.rank == FAULTY_RANK)
        assert_same_bits(before, bench.held_elements(engine))
        return list(raised.value.ranks), str(raised.value)
    for step in range(STEPS):
        result = engine.train_step(bench.step_batches(engine, source, step))
        losses.append([*result.mean_losses(), result.grad_norm])
        masks.maybe_update(step + 1)
    return bench.held_elements(engine), losses, saboteur.forwards + 1


def assert_same_bits(expected: dict[str, Any], found: dict[str, Any]) -> None:
    import torch

    for name, tensors in expected.items():
        for kind in tensors.keys() & found[name].keys():  # stage 3 keeps small parameters only from forward on
            assert torch.equal(tensors[kind][1], found[name][kind][1]), f"{kind} of {name} differs"


def look(stage: int, dtype: str, faults: list[list[str]]) -> list[Any]:
    """First that looking changes nothing, with gradients collected for regrowth in some steps; then each fault."""
    held, losses, passes = train(stage, dtype, every_steps=0)
    watched, same, more = train(stage, dtype, every_steps=1)
    assert_same_bits(held, watched)
    assert losses == same
    assert more > passes, "nothing was computed twice"
    return [train(stage, dtype, 1, what, PASSES[when]) for what, when in faults]


def check(world_size: int, stage: int, dtype: str, *faults: tuple[str, str]) -> None:
    ranks = run_distributed(look, world_size, {"stage": stage, "dtype": dtype, "faults": faults}, timeout=550)
    assert all(rank == ranks[0] for rank in ranks), "all ranks must say the same"
    for (_, when), (named, said) in zip(faults, ranks[0], strict=True):
        if world_size == 2 and when == "always":  # one word against the other
            assert named == [0, 1]
            assert "one of rank 0 and rank 1 computes wrong ones" in said
        else:
            assert named == [FAULTY_RANK]
            assert f"rank {FAULTY_RANK} computes wrong ones" in said
        assert "of step 1 " in said


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2, 3))])
def test_a_flipped_bit_is_caught_and_the_rank_named(stage: int) -> None:
    check(2, stage, "fp32", ("gradient", "as owner"), ("activation", "as checker"), ("activation", "always"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_same_in_bf16(stage: int) -> None:
    check(2, stage, "bf16", ("gradient", "as checker"), ("activation", "as owner"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_one_of_four_ranks(stage: int) -> None:
    check(4, stage, "fp32", ("gradient", "always"), ("activation", "always"), ("activation", "as owner"))


def test_most_digests_are_right() -> None:
    assert wrong_ranks({1: 5, 0: 7}, [7, 7]) == {1}
    assert wrong_ranks({1: 5, 0: 7}, [7, 5]) == set(), "each repeats its own"
    assert wrong_ranks({2: 5, 1: 7}, [7, 7, 5, 7]) == {2}
    assert wrong_ranks({2: 7, 1: 5}, [7, 7, 7, 7]) == {1}
