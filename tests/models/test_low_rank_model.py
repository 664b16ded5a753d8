"""Models with a low-rank term beside their blocks: transformers' own with the summed weights; how they begin; FLOPs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dsbert.base.errors import UserError
from dsbert.config.recipe import Recipe, load_recipe
from dsbert.experiment.cells import overrides
from dsbert.experiment.definition import load_experiment
from dsbert.models.construction import build_model, layer_shapes, recipe_flops
from dsbert.models.device_batch import DeviceBatch
from dsbert.models.spec import model_spec
from dsbert.sparse.low_rank import PARTS
from tests import workbench as bench

ARCHITECTURES = ("bert", "modernbert")
OPTIONS = Path(__file__).parent.parent.parent / "experiments" / "options.yaml"


def recipe(architecture: str, low_rank: int = 3, **sparsity: Any) -> Recipe:
    return bench.recipe(
        model={"architecture": architecture, "dropout": 0.0, "num_layers": 3},
        data={"nsp": architecture == "bert"},
        sparsity={"low_rank": low_rank, **sparsity},
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_is_transformers_with_the_summed_weights(architecture: str) -> None:
    config = recipe(architecture)
    model, layers = build_model(config, bench.VOCAB_SIZE)
    assert any(layer.activation == "gelu" for layer in layers.values()) == (architecture == "bert")
    twin = model_spec(config.model).exported(model.config)
    generator = torch.Generator().manual_seed(0)
    weights = dict(model.state_dict())
    for name, layer in layers.items():
        with torch.no_grad():
            layer.low_rank_u.normal_(std=0.5, generator=generator)
        weights[f"{name}.weight"] = layer.to_dense()
        for part in ("blocks", "rows", "cols", *PARTS):
            del weights[f"{name}.{part}"]
    found = twin.load_state_dict(weights, strict=False)
    assert not found.unexpected_keys
    batch = bench.stream().batch(0, 4)
    inputs = bench.padded(batch, *["token_type_ids"][: architecture != "bert"])
    labels = torch.from_numpy(batch.mlm_labels)
    for training in (False, True):
        losses, _ = model.train(training)(DeviceBatch.of(batch, torch.device("cpu")))
        outputs = twin.train(training)(**inputs)
        logits = outputs["prediction_logits" if architecture == "bert" else "logits"].flatten(0, 1)
        chosen = logits[batch.mlm_positions].log_softmax(-1).gather(1, labels[:, None])
        torch.testing.assert_close(losses[0], -chosen.sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_begins_as_without_the_term(architecture: str) -> None:
    """Bit for bit, whatever else has been drawn; V with the std of plain matrices, also where others begin smaller or,
    for their density, larger."""
    scale: dict[str, Any] = {"initial_scale": "inverse_sqrt"}
    plain, _ = build_model(recipe(architecture, 0, **scale), bench.VOCAB_SIZE)
    model, layers = build_model(recipe(architecture, **scale), bench.VOCAB_SIZE)
    torch.manual_seed(99)
    again, _ = build_model(recipe(architecture, **scale), bench.VOCAB_SIZE)
    own = dict(model.named_parameters())
    for name, param in plain.named_parameters():
        assert torch.equal(own.pop(name), param), name
    assert set(own) == {f"{name}.{part}" for name in layers for part in PARTS}
    for name, param in own.items():
        assert torch.equal(param, again.get_parameter(name)), name
    assert not any(param.any() for name, param in own.items() if name.endswith(PARTS[0]))
    for ending in (".Wo.low_rank_v", ".dense.low_rank_v", ".Wqkv.low_rank_v", ".query.low_rank_v"):
        drawn = [param.flatten() for name, param in own.items() if name.endswith(ending)]
        if drawn:
            assert torch.cat(drawn).std().item() == pytest.approx(0.02 * 0.88, rel=0.1), ending
    batch = DeviceBatch.of(bench.stream().batch(0, 4), torch.device("cpu"))
    assert torch.equal(model(batch)[0], plain(batch)[0])


def test_a_rank_that_no_weight_can_have_is_refused() -> None:
    with pytest.raises(UserError, match=r"^expected sparsity\.low_rank of at most 32 for bert\..*, 32 x 32, found 33$"):
        build_model(recipe("bert", 33), bench.VOCAB_SIZE)


def hand_count(hidden: int, intermediate: int, rank: int, architecture: str) -> int:
    """Weights of the terms of a layer, written out."""
    if architecture == "bert":  # query, key, value, output; up, down
        return rank * (4 * (hidden + hidden) + (hidden + intermediate) + (intermediate + hidden))
    # Wqkv; Wo; Wi with its gate; Wo.
    return rank * ((3 * hidden + hidden) + (hidden + hidden) + (2 * intermediate + hidden) + (hidden + intermediate))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("sparsity", [{}, {"pattern": "dense"}, {"balance": "rows"}])
def test_planned_flops_are_those_of_the_model(architecture: str, sparsity: dict[str, Any]) -> None:
    config = recipe(architecture, **sparsity)
    spec, model = model_spec(config.model), config.model
    built, _ = build_model(config, bench.VOCAB_SIZE)
    kept = sum(entry["kept"] for entry in layer_shapes(built, spec).values())
    attention = 3 * 2 * 2 * spec.attention_pairs(model, [bench.SEQ_LEN]) * model.hidden_size
    assert recipe_flops(config) == 6 * bench.SEQ_LEN * kept + attention
    plain = recipe_flops(recipe(architecture, 0, **sparsity))
    term = 6 * bench.SEQ_LEN * 3 * hand_count(model.hidden_size, model.intermediate_size, 3, architecture)
    assert recipe_flops(config) - plain == (0 if "pattern" in sparsity else term)


@pytest.mark.parametrize(
    ("name", "override", "flops"),
    [
        ("bert-base", "sparsity.block_size=1", 8.33e9),
        ("bert-medium", "sparsity.block_size=1", 2.738e9),
        ("bert-small", "sparsity.pattern=dense", 10.07e9),
        ("bert-mini", "sparsity.pattern=dense", 2.617e9),
    ],
)
def test_the_papers_figures_are_planned(name: str, override: str, flops: float) -> None:
    assert recipe_flops(load_recipe(name, [override])) == pytest.approx(flops, rel=1e-3)


@pytest.mark.parametrize(("size", "flops"), [("cpu", 27_525_120), ("card", 2_736_783_360), ("paper", 2_736_783_360)])
def test_the_arms_that_are_compared_take_the_same_flops(size: str, flops: int) -> None:
    experiment = load_experiment(OPTIONS, size)
    found = {
        arm: load_recipe(experiment.base, overrides(experiment.arms[arm].overrides)) for arm in ("low rank", "dynamic")
    }
    assert {arm: recipe_flops(one) for arm, one in found.items()} == {"low rank": flops, "dynamic": flops}
    assert found["low rank"].sparsity.low_rank == 4
    assert found["low rank"].peak_lr == pytest.approx(found["dynamic"].peak_lr, rel=1e-4)
