import itertools
import math
from fractions import Fraction

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from dsbert.sparse import TorchBlockEditor
from dsbert.sparse.fresh_moments import correct_bias_, exact_mean, exact_sum
from tests.helpers import run_distributed
from tests.sparse.toys import TOTAL_STEPS, Toy, batch

NUMEL = 4  # elements of a block


def some_moments(numel, seed=0):
    """Second moments of very different sizes, as fp32."""
    generator = torch.Generator().manual_seed(seed)
    return 10 ** (torch.rand(numel, generator=generator) * 22 - 20)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_mean_is_exact_whatever_the_shards(data):
    """Against Python's fractions: no order, no cut and no size of a moment changes a bit of it."""
    blocks = data.draw(st.integers(1, 9))
    moments = some_moments(blocks * NUMEL, data.draw(st.integers(0, 99)))
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=blocks, max_size=blocks)))
    cuts = sorted(data.draw(st.lists(st.integers(0, blocks * NUMEL), max_size=4)))
    edges = [0, *cuts, blocks * NUMEL]
    parts = [exact_sum(moments[a:b], a, NUMEL, kept) for a, b in itertools.pairwise(edges)]
    found = exact_mean(torch.stack(parts).sum(0), int(kept.sum()) * NUMEL)
    chosen = [value for value, keep in zip(moments.view(-1, NUMEL).tolist(), kept.tolist(), strict=True) if keep]
    numbers = [Fraction(number) for block in chosen for number in block]
    expected = sum(numbers, Fraction(0)) / max(len(numbers), 1)
    assert abs(Fraction(found) - expected) <= max(expected / 2**52, Fraction(1, 2**87))


def test_moments_that_are_too_large_saturate():
    moments = torch.tensor([3e38, float("inf"), 1.0, 1.0])
    words = exact_sum(moments, 0, NUMEL, torch.tensor([True]))
    assert exact_mean(words, 4) == (2 * (2**20 - 1) + 2) / 4


def slots_of(update, name):
    return update.layers[name].slots.tolist()


def kept_of(update, name, layer):
    return sorted(set(range(layer.num_active)) - set(slots_of(update, name)))


def check_mean(toy, step):
    """One update: fresh blocks begin with the mean of those that stay, in fp32, and without momentum."""
    before = {name: toy.optimizer.state[layer.blocks]["exp_avg_sq"].clone() for name, layer in toy.layers.items()}
    update = toy.masks.maybe_update(step)
    for name, layer in toy.layers.items() if update else ():
        state, fresh, kept = toy.optimizer.state[layer.blocks], slots_of(update, name), kept_of(update, name, layer)
        mean = math.fsum(before[name][kept].flatten().tolist()) / before[name][kept].numel()
        assert state["exp_avg_sq"][fresh].unique().tolist() == [torch.tensor(mean).item()]
        assert not state["exp_avg"][fresh].any()
        assert not layer.blocks[fresh].any()
        assert not layer.blocks.grad[fresh].any()
        assert torch.equal(state["exp_avg_sq"][kept], before[name][kept])
    return update


def test_fresh_blocks_begin_with_the_mean_of_those_that_stay():
    toy = Toy(fresh_moments="mean")
    updates = []
    for step in range(1, TOTAL_STEPS + 1):
        toy.step(step)
        updates.append(check_mean(toy, step))
    assert sum(update is not None for update in updates) == 5


def test_without_survivors_or_steps_the_mean_is_zero():
    unstepped = Toy(fresh_moments="mean")
    assert unstepped.masks.maybe_update(4).num_pruned > 0
    assert not unstepped.optimizer.state
    toy = Toy(fresh_moments="mean", max_prune_ratio=1.0, schedule="constant")
    for step in range(1, 5):
        toy.step(step)
    update = toy.masks.maybe_update(4)
    for name, layer in toy.layers.items():
        assert not kept_of(update, name, layer)
        assert not toy.optimizer.state[layer.blocks]["exp_avg_sq"].any()


class OwnCounts:
    """AdamW as in the textbook, in fp64, on the gradients that a toy's optimizer is given: an own step count, own
    moments and an own weight for each block."""

    def __init__(self, toy):
        self.toy = toy
        self.state = {
            name: [layer.blocks.detach().double().clone(), *(torch.zeros_like(layer.blocks).double() for _ in "mv")]
            for name, layer in toy.layers.items()
        }
        self.counts = {name: torch.zeros(layer.num_active, 1, 1).double() for name, layer in toy.layers.items()}

    def step(self):
        (group,) = self.toy.optimizer.param_groups
        lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
        for name, layer in self.toy.layers.items():
            gradient = layer.blocks.grad.double()
            weight, m, v = self.state[name]
            self.counts[name] += 1
            m.mul_(beta1).add_((1 - beta1) * gradient)
            v.mul_(beta2).add_((1 - beta2) * gradient**2)
            corrected = v / (1 - beta2 ** self.counts[name])
            weight.mul_(1 - lr * decay)
            weight -= lr * m / (1 - beta1 ** self.counts[name]) / (corrected.sqrt() + group["eps"])

    def regrow(self, update):
        for name, layer in update.layers.items():
            self.counts[name][layer.slots] = 0
            for tensor in self.state[name]:
                tensor[layer.slots] = 0

    def error(self):
        """Of the toy's weights and moments, relative to the largest."""
        found = []
        for name, layer in self.toy.layers.items():
            state = self.toy.optimizer.state[layer.blocks]
            tensors = (layer.blocks.detach(), state["exp_avg"], state["exp_avg_sq"])
            for tensor, expected in zip(tensors, self.state[name], strict=True):
                found.append(((tensor.double() - expected).abs().max() / expected.abs().max()).item())
        return max(found)


def error_of_own_counts(toy, skip=()):
    reference = OwnCounts(toy)
    errors, updates = [], 0
    for step in range(1, TOTAL_STEPS + 1):
        toy.optimizer.zero_grad()
        toy.loss(*batch(step)).backward()
        if step not in skip:  # a step that the optimizer does not take is none of its count
            toy.optimizer.step()
            reference.step()
        errors.append(reference.error())
        update = toy.masks.maybe_update(step)
        if update:
            updates += 1
            reference.regrow(update)
    assert updates == 5
    return max(errors)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95), (0.0, 0.99), (0.9, 0.0)])
def test_every_block_has_a_step_count_of_its_own(betas):
    toy = Toy(fresh_moments="count")
    toy.optimizer.param_groups[0].update(betas=betas, weight_decay=0.1)
    assert error_of_own_counts(toy, skip=(6, 7, 15)) < 1e-6


@pytest.mark.parametrize("fused", [False, True])
def test_it_does_not_matter_how_torch_takes_the_step(fused):
    toy = Toy(fresh_moments="count")
    toy.optimizer = torch.optim.AdamW(toy.model.parameters(), lr=1e-2, fused=fused)
    toy.editor = TorchBlockEditor(toy.optimizer)
    toy.manager()
    toy.masks = toy.manager()  # a second manager of one optimizer takes the first one's place
    assert error_of_own_counts(toy) < 1e-6


def test_without_the_option_the_reference_is_another_one():
    """So that the agreement above is no accident."""
    assert error_of_own_counts(Toy()) > 0.01


def test_old_blocks_are_left_alone():
    """Those of 17,320 steps with beta2 = 0.999: nothing is left to correct in fp32. Younger ones are corrected."""
    births = torch.tensor([0, 1000, 20000, 26840, 37330], dtype=torch.int32)
    weights, m = torch.zeros(5 * NUMEL), torch.ones(5 * NUMEL)
    group = {"lr": 1.0, "betas": (0.9, 0.999), "eps": 1e-6}
    correct_bias_(weights, (m, m.clone()), 0, NUMEL, births=births, step=37340, group=group)
    assert weights.view(5, NUMEL)[:3].eq(0).all()
    assert weights.view(5, NUMEL)[3:].ne(0).all()
    # The same, in any slices.
    for first, second in itertools.combinations_with_replacement(range(5 * NUMEL + 1), 2):
        part = torch.zeros(second - first)
        moments = m[first:second], m[first:second]
        correct_bias_(part, moments, first, NUMEL, births=births, step=37340, group=group)
        assert torch.equal(part, weights[first:second])


def test_what_the_optimizer_holds_still_is_not_corrected():
    """torch leaves alone what has no gradient."""
    toy = Toy(fresh_moments="count")
    toy.train(stop=5)
    before = [layer.blocks.detach().clone() for layer in toy.layers.values()]
    toy.optimizer.zero_grad()
    toy.optimizer.step()
    for layer, blocks in zip(toy.layers.values(), before, strict=True):
        assert torch.equal(layer.blocks, blocks)


@pytest.mark.parametrize("stop", [3, 4, 10])
@pytest.mark.parametrize("fresh_moments", ["mean", "count"])
def test_a_restored_run_continues_identically(stop, fresh_moments):
    whole, part, resumed = (Toy(fresh_moments=fresh_moments) for _ in range(3))
    whole.train()
    part.train(stop=stop)
    resumed.model.load_state_dict(part.model.state_dict())
    resumed.optimizer.load_state_dict(part.optimizer.state_dict())
    resumed.masks.load_state_dict(part.masks.state_dict(), step=stop)
    resumed.train(start=stop + 1)
    for found, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(found, expected)
    for key, tensor in whole.masks.state_dict().items():
        assert torch.equal(tensor, resumed.masks.state_dict()[key]), key
    assert any(key.endswith(".born_step") for key in whole.masks.state_dict()) == (fresh_moments == "count")


@pytest.mark.parametrize("fresh_moments", ["mean", "count"])
def test_another_optimizer_is_refused(fresh_moments):
    toy = Toy()
    toy.config = toy.config.model_copy(update={"fresh_moments": fresh_moments})

    def train():
        toy.masks = toy.manager()
        toy.train(stop=4)

    parameters = list(toy.model.parameters())
    for optimizer in (torch.optim.SGD(parameters, lr=0.1, momentum=0.9), torch.optim.Adam(parameters, amsgrad=True)):
        toy.optimizer = optimizer  # type: ignore[assignment]  # another than the toy declares
        toy.editor = TorchBlockEditor(optimizer)
        with pytest.raises(ValueError, match="expected Adam or AdamW without amsgrad"):
            train()


def means_of_updates(toy):
    """What the second moments of each layer add up to after every step."""
    found = []
    for step in range(1, 9):
        toy.step(step)
        check_mean(toy, step)
        moments = [toy.optimizer.state[layer.blocks]["exp_avg_sq"] for layer in toy.layers.values()]
        found.append([moment.double().sum().item() for moment in moments])
    return found


def check_ranks():
    """Replicated weights: each rank adds up an even share, and all have the same mean to the bit."""
    dist.init_process_group("gloo")
    found = means_of_updates(Toy(fresh_moments="mean"))
    dist.destroy_process_group()
    return found


def test_ranks_and_one_process_have_one_mean():
    assert run_distributed(check_ranks, 3) == [means_of_updates(Toy(fresh_moments="mean"))] * 3
