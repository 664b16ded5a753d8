import functools
import itertools
import json
import math
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError

from dsbert.base.collectives import gather_json
from dsbert.base.errors import PeerError
from dsbert.sparse import BlockTopology, DrawKey, UpdateSchedule
from dsbert.sparse.flat_blocks import PRUNE_SCORES, PruneScore, partial_scores
from dsbert.sparse.regrow import REGROW_RULES, RegrowRule
from tests.helpers import run_distributed
from tests.sparse.toys import TOTAL_STEPS, Toy, batch, dense_autograd, plain_draw

UPDATE_STEPS = [4, 8, 12, 16, 20]


def moments(toy, layer):
    state = toy.optimizer.state[layer.blocks]
    return {"weights": layer.blocks.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}


def copies(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def snapshot(toy):
    """Everything that training changes, by name."""
    found: dict[str, torch.Tensor] = {}
    for name, layer in toy.layers.items():
        found |= {f"{name}.{key}": value.clone() for key, value in moments(toy, layer).items()}
        found |= {f"{name}.rows": layer.rows.clone(), f"{name}.cols": layer.cols.clone()}
    return found | copies(toy.masks.state_dict())


def masks(toy):
    return {name: layer.topology.mask() for name, layer in toy.layers.items()}


@pytest.mark.parametrize("regrow", ["random", "gradient"])
@pytest.mark.parametrize("prune_score", ["l1", "l2", "linf"])
def test_survivors_stay_and_moved_slots_are_zero(prune_score, regrow):
    toy = Toy(prune_score=prune_score, regrow=regrow)
    order = {"l1": 1, "l2": 2, "linf": float("inf")}[prune_score]
    seen = 0
    for step in range(1, TOTAL_STEPS + 1):
        toy.step(step)
        before = {name: copies(moments(toy, layer)) for name, layer in toy.layers.items()}
        topologies = {name: layer.topology for name, layer in toy.layers.items()}
        update = toy.masks.maybe_update(step)
        if update is None:
            assert step not in UPDATE_STEPS
            continue
        seen += 1
        assert (update.number, update.step) == (seen, step)
        assert list(update.layers) == list(toy.layers)
        for name, layer in toy.layers.items():
            slots = update.layers[name].slots.tolist()
            kept = sorted(set(range(layer.num_active)) - set(slots))
            assert len(slots) == UpdateSchedule(TOTAL_STEPS, 6, 0.5).num_pruned(step, layer.num_active) > 0
            # The smallest blocks went, and nothing but those slots was re-pointed, each to an empty place.
            norms = torch.linalg.vector_norm(before[name]["weights"].double().flatten(1), ord=order, dim=1)
            assert norms[slots].max() <= norms[kept].min()
            assert torch.equal(layer.topology.positions()[kept], topologies[name].positions()[kept])
            assert not topologies[name].mask()[layer.rows[slots].long(), layer.cols[slots].long()].any()
            for kind, after in moments(toy, layer).items():
                assert torch.equal(after[kept], before[name][kind][kept]), kind
                assert not after[slots].any(), kind
                assert before[name][kind][slots].any(), kind
            gradient = layer.blocks.grad
            assert gradient is not None
            assert not gradient[slots].any()
            assert layer.digest() == toy.masks.topologies[name].digest()
        assert update.digest == toy.masks.digest()
        assert update.num_pruned == sum(change.slots.numel() for change in update.layers.values())
        assert update.seconds > 0
    assert seen == len(UPDATE_STEPS)


def test_the_optimizer_does_not_move_a_fresh_block_by_old_moments():
    """Adam after an update: a re-pointed slot without gradient must not move, which stale moments would make it do."""
    toy = Toy()
    toy.optimizer.param_groups[0]["weight_decay"] = 0.0
    for step in range(1, 5):
        toy.step(step)
    update = toy.masks.maybe_update(4)
    for layer in toy.layers.values():
        layer.blocks.grad.zero_()
    toy.optimizer.step()
    for name, layer in toy.layers.items():
        assert not layer.blocks[update.layers[name].slots].any()


def test_the_decision_is_algorithm_1_of_the_weights():
    """By brute force: as many as the cosine says, the smallest sums of |w|, and the smallest hashes of empty places."""
    toy = Toy(seed=11)
    for step in range(1, 5):
        toy.step(step)
    before = {name: (layer.blocks.tolist(), layer.topology.mask().flatten()) for name, layer in toy.layers.items()}
    update = toy.masks.maybe_update(4)
    for name, (blocks, active) in before.items():
        norms = [math.fsum(abs(weight) for row in block for weight in row) for block in blocks]
        count = round(0.25 * (1 + math.cos(math.pi * 4 / TOTAL_STEPS)) * len(blocks))
        pruned = sorted(range(len(blocks)), key=lambda slot: (norms[slot], slot))[:count]
        grown = plain_draw(DrawKey(11, "regrow", 1, name), (~active).tolist(), count)
        found, num_cols = update.layers[name], toy.layers[name].topology.grid[1]
        assert found.slots.tolist() == sorted(pruned)
        assert (found.rows * num_cols + found.cols).tolist() == grown


# Rules and scores of another program: one function and one line each.


def last_places(topology, key, gradient_norms):
    """The last empty positions, whatever the gradient."""
    num_rows, num_cols = topology.grid
    return -torch.arange(num_rows * num_cols).view(num_rows, num_cols)


def small_gradients(topology, key, gradient_norms):
    return gradient_norms


def largest_entry(w):
    """Of the signed weights, in 2^-20."""
    return (w * 2.0**20).long()


@pytest.mark.parametrize("balance", ["none", "rows"])
def test_a_rule_and_a_score_of_ones_own(balance, monkeypatch):
    monkeypatch.setitem(REGROW_RULES, "last", RegrowRule("last", False, last_places))
    monkeypatch.setitem(PRUNE_SCORES, "signed", PruneScore(largest_entry, "sum", 2.0**20))
    toy = Toy(regrow="last", prune_score="signed", balance=balance, seed=5)
    for step in range(1, TOTAL_STEPS + 1):
        toy.step(step)
        blocks = {name: layer.blocks.detach().double().sum((1, 2)).tolist() for name, layer in toy.layers.items()}
        topologies = {name: layer.topology for name, layer in toy.layers.items()}
        update = toy.masks.maybe_update(step)
        assert [layer.dense_gradient for layer in toy.layers.values()] == [None, None]
        for name, change in update.layers.items() if update else ():
            topology, num_cols = topologies[name], topologies[name].grid[1]
            kept = [sums for slot, sums in enumerate(blocks[name]) if slot not in change.slots.tolist()]
            pruned = [blocks[name][slot] for slot in change.slots.tolist()]
            if balance == "none":
                assert max(pruned) <= min(kept) + 1e-4  # 16 terms, each rounded to 2^-20
            empty = (~topology.mask()).nonzero().tolist()
            lost = Counter(topology.rows[change.slots].tolist())
            expected = sorted(empty)[-change.num_pruned :]
            if balance == "rows":
                expected = [
                    place for row, of_row in itertools.groupby(empty, lambda place: place[0])
                    for place in list(of_row)[-lost[row] :] if lost[row]
                ]  # fmt: skip
            assert [divmod(place, num_cols) for place in sorted((change.rows * num_cols + change.cols).tolist())] == [
                tuple(place) for place in expected
            ]
    toy.masks.verify_replicas()
    monkeypatch.undo()
    with pytest.raises(ValidationError, match="Input should be 'random', 'gradient' or 'mixed'"):
        Toy(regrow="last")
    with pytest.raises(ValidationError, match="Input should be 'l1', 'l2', 'linf' or 'l1_by_age'"):
        Toy(prune_score="signed")


@pytest.mark.parametrize("balance", ["none", "rows"])
def test_a_rule_of_ones_own_that_needs_the_gradient(balance, monkeypatch):
    monkeypatch.setitem(REGROW_RULES, "small", RegrowRule("small", True, small_gradients))
    toy = Toy(regrow="small", balance=balance)
    toy.train(stop=3)
    assert all(layer.dense_gradient is not None for layer in toy.layers.values())
    gradients = dense_autograd(toy, *batch(4))
    empty = {name: ~layer.topology.mask() for name, layer in toy.layers.items()}
    toy.step(4)
    for name, change in toy.masks.maybe_update(4).layers.items():
        num_rows, num_cols = empty[name].shape
        norms = gradients[name].view(num_rows, 4, num_cols, 4).abs().sum((1, 3))
        grown = torch.zeros_like(empty[name])
        grown[change.rows.long(), change.cols.long()] = True
        rows = [slice(None)] if balance == "none" else [row for row in range(num_rows) if grown[row].any()]
        for row in rows:
            left = norms[row][empty[name][row] & ~grown[row]]
            assert norms[row][grown[row]].max() <= left.amin() * (1 + 1e-5) if left.numel() else balance == "rows"


def test_measures_against_recorded_masks():
    """Density, explored degrees of freedom and the ratio of removed new weights, counted from masks alone."""
    toy = Toy()
    recorded, updates = [masks(toy)], []
    assert toy.masks.dof == toy.masks.density == share(recorded[0])
    torch.manual_seed(0)
    for step in range(1, TOTAL_STEPS + 1):
        for layer in toy.layers.values():
            torch.nn.init.normal_(layer.blocks)  # so that chance decides how many new blocks go again
        update = toy.masks.maybe_update(step)
        assert toy.masks.density == share(recorded[0])
        if update is not None:
            recorded.append(masks(toy))
            updates.append(update)
        ever = {name: torch.stack([mask[name] for mask in recorded]).any(0) for name in toy.layers}
        assert toy.masks.dof == share(ever)
    assert [update.number for update in updates] == [1, 2, 3, 4, 5]
    assert updates[-1].dof == toy.masks.dof > toy.masks.density
    assert updates[0].removed_new_ratio == 0
    for index, update in enumerate(updates[1:], start=1):
        before_previous, previous, now = recorded[index - 1 : index + 2]
        pruned = {name: previous[name] & ~now[name] for name in toy.layers}
        new = {name: previous[name] & ~before_previous[name] for name in toy.layers}
        both = sum(int((pruned[name] & new[name]).sum()) for name in toy.layers)
        assert update.removed_new_ratio == both / sum(int(mask.sum()) for mask in pruned.values())
    assert all(0 < update.removed_new_ratio < 1 for update in updates[1:-1])


def share(active):
    return sum(int(mask.sum()) for mask in active.values()) / sum(mask.numel() for mask in active.values())


@pytest.mark.parametrize("regrow", ["random", "gradient"])
@pytest.mark.parametrize("stop", [3, 4, 10])
def test_a_restored_run_continues_identically(stop, regrow):
    """Also where the next step is an update by gradient (3), and right after an update (4)."""
    whole, part, resumed = Toy(regrow=regrow), Toy(regrow=regrow), Toy(regrow=regrow)
    updates = whole.train()
    part.train(stop=stop)
    state = {
        "model": copies(part.model.state_dict()),
        "masks": copies(part.masks.state_dict()),
    }
    optimizer = part.optimizer.state_dict()
    resumed.model.load_state_dict(state["model"])
    resumed.optimizer.load_state_dict(optimizer)
    resumed.masks.load_state_dict(state["masks"], step=stop)
    resumed.masks.verify_replicas()
    again = resumed.train(start=stop + 1)
    assert [update.digest for update in again] == [update.digest for update in updates if update.step > stop]
    assert [(u.removed_new_ratio, u.dof) for u in again] == [
        (u.removed_new_ratio, u.dof) for u in updates if u.step > stop
    ]
    expected, found = snapshot(whole), snapshot(resumed)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def test_the_manager_restores_the_kernels_buffers_alone():
    trained, fresh = Toy(), Toy()
    trained.train()
    assert fresh.masks.digest() != trained.masks.digest()
    fresh.masks.load_state_dict(trained.masks.state_dict(), step=TOTAL_STEPS)
    assert fresh.masks.digest() == trained.masks.digest()
    assert fresh.masks.dof == trained.masks.dof


def test_state_is_a_snapshot():
    """What was saved must not change when the run goes on, nor when it was loaded elsewhere."""
    toy = Toy()
    toy.train(stop=4)
    state = toy.masks.state_dict()
    saved = copies(state)
    other = Toy()
    other.masks.load_state_dict(state, step=4)
    toy.train(start=5)
    other.train(start=5)
    for name, value in saved.items():
        assert torch.equal(state[name], value), name


def test_load_refuses_another_shape():
    with pytest.raises(ValueError, match="expected"):
        Toy().masks.load_state_dict(Toy(sparsity=0.5).masks.state_dict(), step=0)
    with pytest.raises(ValueError, match="expected"):
        Toy().masks.load_state_dict(Toy(block_size=8).masks.state_dict(), step=0)


def test_static_and_dense_never_update():
    static = Toy(pattern="static")
    before = static.masks.digest()
    assert static.train() == []
    assert static.masks.digest() == before
    assert static.masks.dof == static.masks.density
    dense = Toy(pattern="dense")
    assert dense.layers == {}
    assert dense.train() == []
    assert (dense.masks.dof, dense.masks.density) == (1.0, 1.0)
    dense.masks.verify_replicas()


def test_a_full_layer_has_nowhere_to_go():
    toy = Toy(sparsity=0.0)
    digest = toy.masks.digest()
    assert [update.num_pruned for update in toy.train()] == [0] * 5
    assert toy.masks.digest() == digest


def test_constant_schedule_prunes_the_same_number_each_time():
    pruned = [update.num_pruned for update in Toy(schedule="constant", max_prune_ratio=0.25).train()]
    assert len(pruned) == 5
    assert len(set(pruned)) == 1


def test_the_gradient_is_collected_on_update_steps_alone():
    toy = Toy(regrow="gradient")
    for step in range(1, TOTAL_STEPS + 1):
        armed = [layer.dense_gradient is not None for layer in toy.layers.values()]
        assert armed == [step in UPDATE_STEPS] * 2, step
        toy.step(step)
        toy.masks.maybe_update(step)
    assert [layer.dense_gradient for layer in toy.layers.values()] == [None, None]
    with pytest.raises(RuntimeError, match="expected the layers armed for this step"):
        toy.masks.dense_gradients()
    random = Toy(regrow="random")
    random.train(stop=3)
    assert random.layers["0"].dense_gradient is None


def test_gradient_regrowth_takes_the_largest_blocks():
    toy = Toy(regrow="gradient")
    toy.train(stop=3)
    gradients = dense_autograd(toy, *batch(4))
    empty = {name: ~layer.topology.mask() for name, layer in toy.layers.items()}
    toy.step(4)
    update = toy.masks.maybe_update(4)
    for name, change in update.layers.items():
        num_rows, num_cols = empty[name].shape
        norms = gradients[name].view(num_rows, 4, num_cols, 4).abs().sum((1, 3))
        grown = torch.zeros_like(empty[name])
        grown[change.rows.long(), change.cols.long()] = True
        assert norms[grown].min() > norms[empty[name] & ~grown].max() * (1 - 1e-5)


def dense_gradient_error(rank, world_size, accumulation):
    """Largest error of dense_gradients(), relative to the largest entry of autograd on the whole batch."""
    toy = Toy(regrow="gradient")
    toy.masks.load_state_dict(toy.masks.state_dict(), step=3)  # arms for step 4
    x, y = batch(4)
    expected = dense_autograd(toy, x, y)
    for part in range(accumulation):
        mine = slice(part * world_size + rank, None, world_size * accumulation)
        (toy.loss(x[mine], y[mine]) / accumulation).backward()
    found = toy.masks.dense_gradients()
    assert [layer.dense_gradient for layer in toy.layers.values()] == [None, None]
    return max(((found[name] - value).abs().max() / value.abs().max()).item() for name, value in expected.items())


@pytest.mark.parametrize("accumulation", [1, 3])
def test_dense_gradient_equals_autograd_of_the_dense_model(accumulation):
    assert dense_gradient_error(0, 1, accumulation) < 1e-5


@pytest.mark.parametrize("harm", ["kernels", "manager"])
def test_one_process_notices_two_topologies(harm):
    toy = Toy()
    HARMS[harm](toy, "2")
    with pytest.raises(PeerError, match=r"of 2, found two on rank 0"):
        toy.masks.verify_replicas()


# Ranks. Replicated weights: every rank sees its part of the batch, gradients are averaged.


def flip_kernels(toy, name):
    """One entry of the buffer that the kernels read."""
    layer = toy.layers[name]
    layer.rows[0] = (layer.rows[0] + 1) % (layer.shape[0] // layer.block_size)


def replace_copy(toy, name):
    """The manager's record, the kernels untouched."""
    layer = toy.layers[name]
    rows = torch.arange(layer.num_active, dtype=torch.int32)
    num_cols = layer.shape[1] // layer.block_size
    toy.masks.topologies[name] = BlockTopology(layer.shape, layer.block_size, rows // num_cols, rows % num_cols)


def swap_slots(toy, name):
    """Two slots in the kernels' buffer and in the record: the mask stays the same."""
    topology = toy.masks.topologies[name]
    order = torch.arange(topology.num_active)
    order[[0, 1]] = order[[1, 0]]
    swapped = BlockTopology(topology.shape, topology.block_size, topology.rows[order], topology.cols[order])
    assert torch.equal(swapped.mask(), topology.mask())
    toy.masks.topologies[name] = swapped
    toy.layers[name].set_topology(swapped)


HARMS = {"kernels": flip_kernels, "manager": replace_copy, "swap": swap_slots}


def check_ranks():
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    digests = check_training(rank, world_size)
    for harm, at_update in itertools.product(HARMS, (False, True)):
        check_harm(harm, at_update, rank)
    check_another_decision(rank)
    for accumulation in (1, 3):
        error = dense_gradient_error(rank, world_size, accumulation) if 12 % (world_size * accumulation) == 0 else 0.0
        assert error < 1e-5, (accumulation, error)
    decisions = {score: fixed_weight_decisions(score) for score in ("l1", "l2", "linf", "l1_by_age")}
    dist.destroy_process_group()
    return {"digests": digests, "decisions": decisions}


def check_training(rank, world_size):
    """Digests of all layers after every step, as everybody sees them."""
    toy, digests = Toy(), []

    def average():
        for parameter in toy.model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= world_size

    for step in range(1, TOTAL_STEPS + 1):
        x, y = batch(step)
        toy.optimizer.zero_grad()
        toy.loss(x[rank::world_size], y[rank::world_size]).backward()
        average()
        toy.optimizer.step()
        toy.masks.maybe_update(step)
        toy.masks.verify_replicas()
        everybody = gather_json(toy.masks.digest())
        assert everybody == [everybody[0]] * world_size, step
        digests.append(everybody[0])
    weights = gather_json([parameter.double().sum().item() for parameter in toy.model.parameters()])
    assert weights == [weights[0]] * world_size
    return digests


def check_harm(harm, at_update, rank):
    toy = Toy()
    toy.masks.verify_replicas()
    if rank == 1:
        HARMS[harm](toy, "2")
    act = functools.partial(toy.masks.maybe_update, UPDATE_STEPS[0]) if at_update else toy.masks.verify_replicas
    with pytest.raises(PeerError) as caught:
        act()
    message = str(caught.value)
    assert "of 2" in message, (harm, at_update, message)
    assert "rank 1" in message, (harm, at_update, message)
    assert "\n" not in message
    assert gather_json(message) == [message] * dist.get_world_size()


def check_another_decision(rank):
    """Equal before the update, not after it: found before the next step."""
    toy = Toy()
    masks = toy.manager(seed=4 if rank == 1 else 3)
    masks.verify_replicas()
    with pytest.raises(PeerError, match=r"of 0 equal on all ranks .*, found: rank 1 has"):
        masks.maybe_update(UPDATE_STEPS[0])


def fixed_weight_decisions(prune_score):
    """Digests and norms of five updates of weights that nobody trains: equal weights, equal decisions."""
    toy = Toy(prune_score=prune_score)
    updates = [toy.masks.maybe_update(step) for step in UPDATE_STEPS]
    return json.loads(json.dumps([[update.digest, update.norms] for update in updates]))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks(world_size):
    results = run_distributed(check_ranks, world_size)
    assert results == [results[0]] * world_size
    digests = results[0]["digests"]
    changed = [step + 1 for step in range(1, TOTAL_STEPS) if digests[step] != digests[step - 1]]
    assert changed == UPDATE_STEPS
    # The decision does not depend on how many take it.
    for score, decisions in results[0]["decisions"].items():
        assert decisions == fixed_weight_decisions(score), score


def test_digest_covers_every_layer_by_name():
    toy = Toy()
    before = toy.masks.digest()
    assert before == "04e1f2e9ace9f48879514a19382039c5"
    for name in toy.layers:
        swap_slots(toy, name)
        assert toy.masks.digest() != before
        swap_slots(toy, name)
        assert toy.masks.digest() == before
    toy.layers = {"0": toy.layers["0"], "3": toy.layers["2"]}
    assert toy.manager().digest() != before
    toy.layers = {"2": toy.layers["3"], "0": toy.layers["0"]}
    assert toy.manager().digest() == before


@pytest.mark.parametrize("balance", ["none", "rows"])
@pytest.mark.parametrize("min_age", [0, 2, 3])
def test_the_young_are_not_pruned(min_age, balance):
    """Ages are counted here from what updates say they did."""
    toy = Toy(min_age_updates=min_age, balance=balance, max_prune_ratio=1.0, schedule="constant", num_updates=12)
    allocated: dict[str, dict[int, int]] = {name: {} for name in toy.layers}
    youngest = []
    for update in toy.train():
        for name, change in update.layers.items():
            ages = [update.number - allocated[name][slot] for slot in change.slots.tolist() if slot in allocated[name]]
            youngest += ages
            allocated[name] |= dict.fromkeys(change.slots.tolist(), update.number)
            assert change.num_pruned == len(set(change.slots.tolist()))
    assert min(youngest) == max(min_age, 1)


@pytest.mark.parametrize("balance", ["none", "rows"])
def test_blocks_are_compared_by_norm_over_the_root_of_their_age(balance):
    """Ages are counted here from what updates say they did, and go beyond the 8 updates after which none counts."""
    toy = Toy(prune_score="l1_by_age", balance=balance, schedule="constant", max_prune_ratio=0.1, num_updates=24)
    torch.manual_seed(0)
    allocated: dict[str, dict[int, int]] = {name: {} for name in toy.layers}
    oldest, decided_by_age = 0, 0
    for step in range(1, TOTAL_STEPS + 1):
        for layer in toy.layers.values():
            torch.nn.init.normal_(layer.blocks)  # so that norms say nothing about ages
        before = {name: layer.blocks.detach().double().abs().sum((1, 2)).tolist() for name, layer in toy.layers.items()}
        room = {name: (~layer.topology.mask()).sum(1).tolist() for name, layer in toy.layers.items()}
        rows = {name: layer.topology.rows.tolist() for name, layer in toy.layers.items()}
        update = toy.masks.maybe_update(step)
        for name, change in update.layers.items() if update else ():
            ages = [update.number - allocated[name].get(slot, -8) for slot in range(len(before[name]))]
            fair = [norm / math.sqrt(min(age, 8)) for norm, age in zip(before[name], ages, strict=True)]
            pruned = plainly_pruned(fair, rows[name], room[name], change.num_pruned, balance)
            assert change.slots.tolist() == pruned
            decided_by_age += pruned != plainly_pruned(before[name], rows[name], room[name], len(pruned), balance)
            oldest = max(oldest, *(update.number - born for born in allocated[name].values()), 0)
            allocated[name] |= dict.fromkeys(change.slots.tolist(), update.number)
    assert oldest > 8
    assert decided_by_age


def plainly_pruned(norms, rows, room, count, balance):
    """The slots of the smallest norms, one after the other; with rows as many of one as it has room for."""
    pruned: list[int] = []
    for slot in sorted(range(len(norms)), key=lambda slot: (norms[slot], slot)):
        full = sum(rows[other] == rows[slot] for other in pruned) == room[rows[slot]]
        if len(pruned) < count and not (balance == "rows" and full):
            pruned.append(slot)
    return sorted(pruned)


def test_noise_alone_scores_alike_at_every_age():
    """The reason for the root: AdamW on gradients of noise, an update every 100 steps. With the age itself the eighth
    would have a third of the first."""
    torch.manual_seed(0)
    weights = torch.zeros(50 * 256, requires_grad=True)
    optimizer = torch.optim.AdamW([weights], lr=1e-3)
    score, found = PRUNE_SCORES["l1_by_age"], []
    for step in range(1, 801):
        weights.grad = torch.randn(weights.shape) * 1e-3
        optimizer.step()
        if step % 100 == 0:
            scores = partial_scores(weights.detach(), 0, 50, 256, score)
            assert score.by_age is not None
            found.append(score.by_age(scores, torch.full((50,), step // 100)).mean().item())
    assert max(found) / min(found) < 1.15
