"""Moments of regrown blocks through DeepSpeed: real ranks, each ZeRO stage in processes of its own.

The truth is AdamW as in the textbook, in fp64, on the gradients that the inner optimizer is given.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers import run_distributed

STEPS, SAVE_AT, SKIPPED = 16, 6, 9


class OwnCounts:
    """Of what this rank holds of the sparse layers: own weights, moments and step count for every element."""

    def __init__(self, engine: Any) -> None:
        import torch

        from dsbert.engine.zero_shards import inner_optimizer

        self.engine, self.gradients = engine, dict[str, torch.Tensor]()
        self.names = {f"{name}.blocks": layer.block_size**2 for name, layer in engine.layers.items()}
        self.state = {}
        for name in self.names:
            weight = engine.shard(name).master.double().clone()
            self.state[name] = [weight, *(torch.zeros_like(weight) for _ in range(3))]
        inner_optimizer(engine.deepspeed_engine).register_step_pre_hook(self.read)

    def read(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """The gradients of the step that is about to be taken, beside the masters that they belong to."""
        for flat in [flat for group in optimizer.param_groups for flat in group["params"] if flat.grad is not None]:
            for name in self.names:
                shard = self.engine.shard(name)
                start = (shard.master.data_ptr() - flat.data_ptr()) // flat.element_size()
                if shard.numel and 0 <= start < flat.numel():
                    self.gradients[name] = flat.grad.view(-1)[start : start + shard.numel].double()

    def step(self, lr: float) -> None:
        optim = self.engine.recipe.optim
        held = {name for name in self.names if self.engine.shard(name).numel}
        assert self.gradients.keys() == held
        for name, gradient in self.gradients.items():
            weight, m, v, count = self.state[name]
            count += 1
            m.mul_(optim.beta1).add_((1 - optim.beta1) * gradient)
            v.mul_(optim.beta2).add_((1 - optim.beta2) * gradient**2)
            root = (v / (1 - optim.beta2**count)).sqrt()
            weight.mul_(1 - lr * optim.weight_decay)
            weight -= lr * m / (1 - optim.beta1**count) / (root + optim.eps)
        self.gradients.clear()

    def regrow(self, update: Any) -> None:
        for name, layer in update.layers.items():
            for tensor in self.state[f"{name}.blocks"]:
                tensor[self.of(f"{name}.blocks", layer.slots)] = 0

    def of(self, name: str, slots: Any) -> Any:
        """bool [n]: which elements of this rank's shard belong to the slots."""
        import torch

        shard = self.engine.shard(name)
        return torch.isin((torch.arange(shard.numel) + shard.offset) // self.names[name], slots)

    def error(self) -> float:
        """Largest of the weights, which are of size 0.02; one step is 1e-2."""
        errors = [
            (self.engine.shard(name).master.double() - weight).abs().max().item()
            for name, (weight, *_) in self.state.items()
            if weight.numel()
        ]
        return max(errors, default=0.0)


def take_step(engine: Any, source: Any, step: int) -> Any:
    """A step; one of them is skipped, so that Adam's count is not the run's."""
    from tests import workbench as bench

    batches = bench.step_batches(engine, source, step - 1)
    if step == SKIPPED:
        handle = engine.parameters["bert.embeddings.word_embeddings.weight"].register_hook(lambda g: g * float("nan"))
    result = engine.train_step(batches)
    if step == SKIPPED:
        handle.remove()
    assert result.skipped == (step == SKIPPED)
    return result


def counted(stage: int, dtype: str, directory: str) -> dict[str, Any]:
    """Train with an own count for each block, save at a step, and go on from that in a second engine."""
    import torch

    from dsbert.checkpoint.loading import load_checkpoint, verify_checkpoint
    from dsbert.checkpoint.publisher import Retention
    from dsbert.checkpoint.state import Totals
    from dsbert.checkpoint.writer import CheckpointWriter
    from dsbert.cluster import process_group
    from tests import workbench as bench

    world = process_group.init(60)
    sparsity = {"fresh_moments": "count", "num_updates": 4, "min_age_updates": 3}
    recipe = bench.recipe(
        deepspeed=bench.zero_config(stage, dtype),
        sparsity=sparsity,
        optim={"total_steps": STEPS, "weight_decay": 0.1, "lr": 1e-2},
    )
    source = bench.stream()
    engine, masks = bench.engine_and_masks(recipe, world)
    engine.prove_layout()
    reference, errors, losses, path = OwnCounts(engine), [], [], None
    for step in range(1, STEPS + 1):
        result = take_step(engine, source, step)
        losses.append(result.mean_losses())
        if not result.skipped:
            reference.step(result.lr)
        errors.append(reference.error())
        check_copies(engine)
        update = masks.maybe_update(step)
        if update:
            assert update.num_pruned
            reference.regrow(update)
        if step == SAVE_AT:
            companions = Path(directory) / "companions"
            companions.mkdir(exist_ok=True)
            writer = CheckpointWriter(Path(directory), companions, attempt="1-test", retention=Retention(2))
            path = writer.save(engine, masks, bench.run_record(engine.recipe), Totals()).path
    first, births = bench.held_elements(engine), masks.state_dict()
    counts = {int(count) for key, own in births.items() if key.endswith(".born_step") for count in own.unique()}
    # Updates follow steps 4, 8 and 12; the skipped step 9 is none of Adam's. What is new stays, so that it takes
    # part in all that follows.
    assert counts == {0, 4, 8, 11}
    assert path is not None
    assert verify_checkpoint(path) == []
    engine, masks = bench.engine_and_masks(recipe, world)
    load_checkpoint(path, engine, masks)
    again = []
    for step in range(SAVE_AT + 1, STEPS + 1):
        again.append(take_step(engine, source, step).mean_losses())
        masks.maybe_update(step)
    assert again == losses[SAVE_AT:]
    second = bench.held_elements(engine)
    for name, tensors in first.items():
        for kind, (_, tensor) in tensors.items():
            assert torch.equal(tensor, second[name][kind][1]), (name, kind)
    assert all(torch.equal(own, masks.state_dict()[key]) for key, own in births.items())
    return {"error": max(errors), "losses": losses, "digest": masks.digest()}


def check_copies(engine: Any) -> None:
    """What forward reads is what the optimizer has, in forward's precision: where this rank holds both."""
    import torch

    from dsbert.engine.zero_shards import forward_copies

    for name in (f"{layer}.blocks" for layer in engine.layers):
        shard = engine.shard(name)
        for copy, offset in forward_copies(engine.parameters[name]):
            start, stop = max(offset, shard.offset), min(offset + copy.numel(), shard.offset + shard.numel)
            if start < stop:
                own = shard.master[start - shard.offset : stop - shard.offset]
                assert torch.equal(copy[start - offset : stop - offset], own.to(copy.dtype)), name


def averaged(stage: int, dtype: str) -> dict[str, Any]:
    """Fresh blocks begin with the mean of those of their weight that stay, wherever these are held."""
    import torch
    import torch.distributed as dist

    from dsbert.base.collectives import gather_json
    from dsbert.cluster import process_group
    from dsbert.engine.zero_shards import full_shape
    from tests import workbench as bench

    world = process_group.init(60)
    recipe = bench.recipe(
        deepspeed=bench.zero_config(stage, dtype),
        sparsity={"fresh_moments": "mean", "num_updates": 8},
        optim={"total_steps": STEPS},
    )
    source = bench.stream()
    engine, masks = bench.engine_and_masks(recipe, world)
    slots_of, means = OwnCounts(engine), []
    for step in range(1, SAVE_AT + 1):
        take_step(engine, source, step)
        before = bench.held_elements(engine)
        update = masks.maybe_update(step)
        for layer, change in update.layers.items() if update else ():
            name, after = f"{layer}.blocks", bench.held_elements(engine)[f"{layer}.blocks"]
            whole = torch.zeros(full_shape(engine.parameters[name]).numel(), dtype=torch.float64)
            if "exp_avg_sq" in before[name]:
                offset, mine = before[name]["exp_avg_sq"]
                whole[offset : offset + mine.numel()] = mine.double()
            if stage:
                dist.all_reduce(whole)
            kept = torch.ones(full_shape(engine.parameters[name])[0], dtype=torch.bool)
            kept[change.slots] = False
            mean = whole.view(len(kept), -1)[kept].mean().item()
            fresh = slots_of.of(name, change.slots)
            for kind, (_, tensor) in after.items():
                if kind == "exp_avg_sq":
                    own = tensor[fresh].unique().tolist()
                    means.append(own[0] if own else None)
                    assert own == [pytest.approx(mean, rel=1e-6)] * bool(fresh.any())
                    assert torch.equal(tensor[~fresh], before[name][kind][1][~fresh])
                elif kind in ("exp_avg", "master"):
                    assert not tensor[fresh].any()
    everybody = gather_json(means)
    for found in zip(*everybody, strict=True) if len({len(own) for own in everybody}) == 1 else ():
        assert len({mean for mean in found if mean is not None}) == 1, "equal on all ranks, to the bit"
    return {"means": [mean for mean in means if mean is not None], "digest": masks.digest()}


slow, exhaustive = pytest.mark.slow, pytest.mark.exhaustive
FURTHER_FP32 = [(2, 2), (1, 1), (3, 3)]
FURTHER_MEANS = [(2, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16")]


@pytest.mark.parametrize(
    ("stage", "world_size"),
    [
        (1, 2),
        *(pytest.param(*cell, marks=slow) for cell in ((0, 2), (3, 2))),
        *(pytest.param(*cell, marks=exhaustive) for cell in FURTHER_FP32),
    ],
)
def test_a_block_takes_the_steps_of_its_own_count(stage: int, world_size: int, tmp_path: Path) -> None:
    ranks = run_distributed(counted, world_size, {"stage": stage, "dtype": "fp32", "directory": str(tmp_path)})
    assert max(rank["error"] for rank in ranks) < 1e-6
    assert len({rank["digest"] for rank in ranks}) == 1


@pytest.mark.parametrize(
    "stage", [pytest.param(3, marks=slow), *(pytest.param(stage, marks=exhaustive) for stage in (0, 1, 2))]
)
def test_in_bf16_the_masters_take_the_same_steps(stage: int, tmp_path: Path) -> None:
    ranks = run_distributed(counted, 2, {"stage": stage, "dtype": "bf16", "directory": str(tmp_path)})
    assert max(rank["error"] for rank in ranks) < 1e-6


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        (1, "fp32"),
        *(pytest.param(*cell, marks=slow) for cell in ((0, "fp32"), (3, "bf16"))),
        *(pytest.param(*cell, marks=exhaustive) for cell in FURTHER_MEANS),
    ],
)
def test_fresh_blocks_begin_with_the_mean_of_those_that_stay(stage: int, dtype: str) -> None:
    ranks = run_distributed(averaged, 2, {"stage": stage, "dtype": dtype})
    # Queries and keys that do not meet have no gradients, and so no moments.
    assert all(max(rank["means"]) > 0 for rank in ranks)
    assert ranks[0]["digest"] == ranks[1]["digest"]
