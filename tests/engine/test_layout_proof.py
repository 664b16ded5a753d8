"""What DeepSpeed trains is what dsbert saves: proven at start for every configuration, or refused. The truth is stage 0
in fp32, where every rank holds everything; weights and moments are compared element by element through projections.
"""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import pytest

from tests.helpers import run_distributed

STEPS = 8  # with an update after the fourth
ZERO = "zero_optimization"


def configuration(stage: int, dtype: str = "fp32", zero: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    config: dict[str, Any] = {ZERO: {"stage": stage} | (zero or {}), **keys}
    if dtype != "fp32":
        config[dtype] = {"enabled": True} | keys.get(dtype, {})
    return config


@functools.cache
def world() -> Any:
    from deepspeed.accelerator import get_accelerator

    from dsbert.cluster import process_group

    type(get_accelerator()).is_fp16_supported = lambda self: True  # slow on a CPU, but right
    return process_group.init(60)


def train(overrides: dict[str, Any], *, proven: bool = True) -> dict[str, Any]:
    """Losses, topologies, and per parameter a projection of weights and moments; or why it was refused."""
    from dsbert.base.errors import UserError
    from tests import workbench as bench

    recipe = bench.recipe(deepspeed={"config": "zero0_fp32", "overrides": overrides})
    try:
        engine, masks = bench.engine_and_masks(recipe, world())
        if proven:
            assert_no_trace(engine)
    except UserError as error:
        return {"refused": str(error)}
    source, losses, digests = bench.stream(), [], []
    for step in range(1, STEPS + 1):
        result = engine.train_step(bench.step_batches(engine, source, step - 1))
        losses.append(result.mean_losses())
        if update := masks.maybe_update(step):
            digests.append(update.digest)
    return {"losses": losses, "digests": digests, "norm": result.grad_norm, "held": projections(engine)}


def assert_no_trace(engine: Any) -> None:
    """Of the proof: not in weights, moments, copies, counters or the generator."""
    import torch

    from dsbert.engine.zero_shards import adam_step, inner_optimizer
    from tests import workbench as bench

    def everything() -> tuple[Any, ...]:
        counters = engine.counters() | {"micro_steps": engine.deepspeed_engine.micro_steps}
        return counters, adam_step(engine.deepspeed_engine), len(inner_optimizer(engine.deepspeed_engine).state)

    before, bits, generator = everything(), bench.held_elements(engine), torch.get_rng_state()
    engine.prove_layout()
    assert everything() == before
    assert torch.equal(torch.get_rng_state(), generator)
    for name, tensors in bench.held_elements(engine).items():
        assert tensors.keys() == bits[name].keys()
        for kind, (offset, tensor) in tensors.items():
            assert (offset, tensor.tolist()) == (bits[name][kind][0], bits[name][kind][1].tolist()), (name, kind)


def projections(engine: Any) -> dict[str, list[float]]:
    """Of master and moments of every parameter on numbers that differ from place to place, over all ranks."""
    import torch

    from dsbert.base.collectives import all_reduce

    found = {}
    for name, shard in engine.shards().items():
        places = torch.arange(shard.offset, shard.offset + shard.numel, dtype=torch.float64)
        weights = (places * 0.7391).sin()
        held = [shard.master, *(shard.moments.get(kind) for kind in ("exp_avg", "exp_avg_sq"))]
        values = [0.0 if tensor is None else float((tensor.double() * weights).sum()) for tensor in held]
        found[name] = all_reduce(torch.tensor(values, dtype=torch.float64)).tolist()
    return found


def train_all(configurations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [train(overrides) for overrides in configurations]


def proof_changes_nothing(overrides: dict[str, Any]) -> dict[str, Any]:
    without = train(overrides, proven=False)
    assert train(overrides) == without
    return without


@pytest.fixture(scope="module")
def truth() -> dict[str, Any]:
    ranks = run_distributed(proof_changes_nothing, 2, {"overrides": configuration(0)})
    assert ranks[0] == ranks[1]
    return ranks[0]


def assert_as_stage_0(found: dict[str, Any], truth: dict[str, Any], exact: bool) -> None:
    loss, weight = (1e-5, 1e-4) if exact else (2e-2, 0.3)
    assert found["digests"] == truth["digests"] or not exact
    assert found["norm"] == pytest.approx(truth["norm"], rel=1e-3 if exact else 0.1)
    for mine, right in zip(found["losses"], truth["losses"], strict=True):
        assert mine == pytest.approx(right, abs=loss)
    for name, (master, first, second) in truth["held"].items():
        own = found["held"][name]
        assert own[0] == pytest.approx(master, abs=weight), name
        if exact:
            assert own[1:] == pytest.approx([first, second], rel=1e-2, abs=1e-6), name


# (configuration, the key that a refusal names; None: it trains as stage 0 does). Few here, all below.
QUICK = [
    (configuration(1), None),
    (configuration(1, zero={"round_robin_gradients": True}), None),
    (configuration(2, zero={"round_robin_gradients": True, "parameter_alignment": True}), None),
    (configuration(2, "bf16", zero={"round_robin_gradients": True}), None),
    (configuration(1, "fp16"), None),
    (configuration(1, managed_gradient_accumulation=False), "managed_gradient_accumulation"),
    (
        configuration(1, "bf16", bf16={"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}),
        "bf16.bf16",
    ),
]

PARTITIONED: list[dict[str, Any]] = [
    {"round_robin_gradients": True},
    {"parameter_alignment": True},
    {"contiguous_gradients": False},
    {"overlap_comm": True},
    {"reduce_scatter": False},
    {"allgather_partitions": False},
    {"use_multi_rank_bucket_allreduce": False},
    {"elastic_checkpoint": True},
    {"ignore_unused_parameters": False},
    {"reduce_bucket_size": 500},
    {"allgather_bucket_size": 500},
    {"zero_quantized_weights": True},  # of stage 3 only, as the next
    {"zero_quantized_gradients": True},
]
GATHERED: list[dict[str, Any]] = [
    {"stage3_param_persistence_threshold": 10**6},
    {"stage3_model_persistence_threshold": 100},
    {"sub_group_size": 5000},
    {"overlap_comm": False},
    {"contiguous_gradients": False},
    {"reduce_scatter": False},
    {"stage3_max_live_parameters": 0},
    {"stage3_max_reuse_distance": 0},
    {"stage3_prefetch_bucket_size": 0},
    {"stage3_use_all_reduce_for_fetch_params": True},
    {"stage3_allgather_sequential": True},
    {"round_robin_gradients": True},
    {"memory_efficient_linear": False},
    {"override_module_apply": False},
    {"reduce_bucket_size": 500},
    {"leaf_module": {"classes": ["BertLayer"]}},
]
AUTOCAST = {"enabled": True, "dtype": "bfloat16"}
EVERYTHING: dict[str, list[tuple[dict[str, Any], str | None]]] = {
    "stage 1": [(configuration(1, zero=zero), None) for zero in PARTITIONED],
    "stage 2": [(configuration(2, zero=zero), None) for zero in PARTITIONED],
    "stage 3": [
        *((configuration(3, zero=zero), None) for zero in GATHERED),
        (configuration(3, zero={"stage3_module_granularity_threshold": 100000}), "module_granularity"),
        (configuration(3, zero={"zero_quantized_weights": True}), "zero_quantized_weights"),
        (configuration(3, zero={"zero_quantized_gradients": True}), "zero_quantized_gradients"),
        (configuration(3, prescale_gradients=True), "prescale_gradients"),
        (configuration(3, managed_gradient_accumulation=False), "managed_gradient_accumulation"),
        (configuration(3, communication_data_type="bf16"), None),
        (configuration(3, "bf16"), None),
        (configuration(3, "fp16"), None),
        (configuration(3, "bf16", bf16={"bf16_master_weights_and_grads": True}), "bf16_master"),
        (configuration(3, torch_autocast=AUTOCAST), None),
    ],
    "gradients": [
        (configuration(stage, **keys), refused if stage in stages else None)
        for keys, refused, stages in (
            ({"prescale_gradients": True}, "prescale_gradients", (2,)),
            ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor", (2,)),
            ({"prescale_gradients": True, "gradient_predivide_factor": 4.0}, "gradient_predivide_factor", (2,)),
            ({"sparse_gradients": True}, "sparse_gradients", (0, 1, 2)),
            ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation", (0, 1, 2)),
            ({"communication_data_type": "fp16"}, None, ()),
            ({"communication_data_type": "bf16"}, None, ()),
            ({"data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype", (0,)),
        )
        for stage in (0, 1, 2)
    ],
    "half precisions": [
        *((configuration(stage, dtype), None) for stage in (0, 1, 2) for dtype in ("bf16", "fp16")),
        *((configuration(stage, torch_autocast=AUTOCAST), None) for stage in (0, 1, 2)),
        (configuration(0, torch_autocast=AUTOCAST | {"dtype": "float16"}), "torch_autocast"),
        (configuration(1, torch_autocast=AUTOCAST | {"dtype": "float16"}), None),
        (configuration(0, "bf16", data_types={"grad_accum_dtype": "fp32"}), "grad_accum_dtype"),
        (configuration(1, "bf16", data_types={"grad_accum_dtype": "fp32"}), None),
        (configuration(2, "bf16", data_types={"grad_accum_dtype": "fp32"}), None),
        (configuration(1, "bf16", bf16={"immediate_grad_update": True}), None),
        (configuration(1, "bf16", bf16={"check_grad_overflow": False}), None),
        (configuration(1, "bf16", bf16={"bf16_master_weights_and_grads": True}), "bf16_master"),
        (configuration(1, "bf16", prescale_gradients=True, gradient_predivide_factor=2.0), None),
        (configuration(0, "bf16", prescale_gradients=True, gradient_predivide_factor=2.0), None),
    ],
}


def check(cases: list[tuple[dict[str, Any], str | None]], truth: dict[str, Any], world_size: int = 2) -> None:
    ranks = run_distributed(train_all, world_size, {"configurations": [overrides for overrides, _ in cases]}, 900)
    assert ranks[0] == ranks[-1]
    for (overrides, key), found in zip(cases, ranks[0], strict=True):
        print(overrides, found.get("refused"))
        if key is None:
            exact = not {"bf16", "fp16", "torch_autocast", "communication_data_type", "data_types"} & overrides.keys()
            assert "refused" not in found, (overrides, found)
            assert_as_stage_0(found, truth, exact)
        else:
            assert key in found["refused"], (overrides, found)
            assert "\n" not in found["refused"]


@pytest.mark.slow
def test_a_configuration_trains_as_stage_0_or_is_refused(truth: dict[str, Any]) -> None:
    check(QUICK, truth)


@pytest.mark.slow
def test_stage_3_trains_as_stage_0(truth: dict[str, Any]) -> None:
    check([(configuration(3), None), (configuration(3, zero={"stage3_param_persistence_threshold": 0}), None)], truth)


@pytest.mark.exhaustive
@pytest.mark.parametrize("group", EVERYTHING)
def test_every_key_that_moves_things_trains_as_stage_0_or_is_refused(group: str, truth: dict[str, Any]) -> None:
    check(EVERYTHING[group], truth)


@pytest.mark.exhaustive
def test_three_ranks_do_not_matter(truth: dict[str, Any]) -> None:
    check(QUICK, truth, world_size=3)


def refuse_what_is_displaced(kind: str) -> str:
    """The proof, where dsbert looks in another place than DeepSpeed."""
    from dsbert.base.errors import UserError
    from dsbert.engine import layout_proof
    from dsbert.engine.zero_shards import ParamShard, forward_copies, param_shard
    from tests import workbench as bench

    engine, _ = bench.engine_and_masks(bench.recipe(deepspeed=bench.zero_config(1, "bf16")), world())
    victim = engine.parameters["bert.pooler.dense.weight"]  # of which rank 1 holds all

    def displaced_shard(ds: Any, param: Any) -> ParamShard:
        shard = param_shard(ds, param)
        if param is not victim or world().rank != 1:
            return shard
        return ParamShard(shard.offset + 1, shard.master[:-1], shard.moments)

    def missing_copy(param: Any) -> Any:
        if param is victim and world().rank == 1:
            return ((tensor.clone(), offset) for tensor, offset in forward_copies(param))
        return forward_copies(param)

    wrong = {"param_shard": displaced_shard, "forward_copies": missing_copy}[kind]
    try:
        with mock.patch.object(layout_proof, kind, wrong):
            engine.prove_layout()
    except UserError as error:
        return str(error)
    return "not refused"


@pytest.mark.parametrize(
    ("kind", "said"),
    [("param_shard", "the optimizer is given another gradient"), ("forward_copies", "what a load writes is not")],
)
def test_a_place_that_differs_on_one_rank_is_named(kind: str, said: str) -> None:
    for found in run_distributed(refuse_what_is_displaced, 2, {"kind": kind}):
        assert "found on rank 1: bert.pooler.dense.weight: " in found
        assert said in found
