"""Which backend computes what: the rule on recorded timings, the cache, plans that ranks share and checkpoints keep."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dsbert.sparse import BlockSparseLinear, BlockTopology, DrawKey
from dsbert.sparse.kernel_plan import plan_kernels
from dsbert.sparse.kernels import dispatch
from dsbert.sparse.kernels.backends import BACKENDS, DENSE
from dsbert.sparse.kernels.dispatch import choose, decide
from dsbert.sparse.kernels.index import PRODUCTS
from dsbert.sparse.kernels.record import Choice, KernelRecord
from dsbert.sparse.sparsity_errors import KernelError
from tests.helpers import run_distributed

# Milliseconds of BERT-Base's products at density 0.1, on one core of an AVX2 machine.
RECORDED = {
    "768x768 B16 forward": ({"cpu": 1.05, "reference": 9.8, "dense": 8.1, "dense_onednn": 8.6}, "cpu"),
    "768x768 B16 bf16": ({"cpu": 1.0, "reference": 31.0, "dense": 82.0, "dense_fp32": 9.1}, "cpu"),
    "no compiler": ({"reference": 9.8, "dense": 8.1, "dense_onednn": 8.6}, "dense"),
    "small model, no compiler": ({"reference": 0.30, "dense": 0.47, "dense_onednn": 0.52}, "reference"),
    "exactly 5 % faster": ({"cpu": 1.0, "dense": 1.05}, "cpu"),
    "not quite 5 % faster": ({"cpu": 1.0, "dense": 1.0499}, "dense"),
    "faster than one dense product, not than the best": (
        {"cpu": 1.0, "dense": 5.0, "dense_onednn": 1.02},
        "dense_onednn",
    ),
    "dense only": ({"dense": 2.0, "dense_onednn": 1.0}, "dense_onednn"),
    "sparse only": ({"cpu": 2.0, "reference": 1.0}, "reference"),
}


@pytest.mark.parametrize("name", RECORDED)
def test_sparse_only_where_it_is_at_least_5_percent_faster(name: str) -> None:
    timings, expected = RECORDED[name]
    assert decide(timings) == expected


def layer(kernels: str = "auto", size: int = 16, shape: tuple[int, int] = (64, 96)) -> BlockSparseLinear:
    return BlockSparseLinear(BlockTopology.random(shape, size, 0.3, DrawKey(0, "init", 0, "x")), kernels=kernels)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DSBERT_CACHE", str(tmp_path))
    monkeypatch.setattr(dispatch._Table, "_memory", {})
    return tmp_path


def test_measured_once_and_remembered_on_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = layer().index
    first = choose(index, "auto", tokens=32, dtype=torch.float32)
    assert set(first.timings) == {"forward", "dgrad", "wgrad"}
    assert {"cpu", "reference", "dense", "dense_onednn"} == set(first.timings["forward"])
    assert first.choice == Choice(*(decide(first.timings[product]) for product in PRODUCTS))
    (path,) = cache.rglob("timings-*.json")
    recorded = json.loads(path.read_text())
    assert recorded["hardware"]
    assert "torch" in recorded["versions"]

    def forbidden(*_: object) -> dispatch.Timings:
        raise AssertionError("measured again")

    monkeypatch.setattr(dispatch, "_measure", forbidden)
    dispatch._Table._memory.clear()  # as in another process
    assert choose(index, "auto", tokens=32, dtype=torch.float32) == first
    assert choose(index, "auto", tokens=20, dtype=torch.float32) == first  # the same power of two
    with pytest.raises(AssertionError, match="measured again"):
        choose(index, "auto", tokens=33, dtype=torch.float32)
    path.write_text("{")  # torn: it is measured again
    dispatch._Table._memory.clear()
    with pytest.raises(AssertionError, match="measured again"):
        choose(index, "auto", tokens=32, dtype=torch.float32)


def raced(monkeypatch: pytest.MonkeyPatch, cost: Callable[[str, int], float]) -> tuple[dict[str, float], list[str]]:
    """The times of a race by a clock that `cost` moves: milliseconds of a backend's n-th call, warm-up included."""
    clock, calls = [0.0], []

    def call(name: str) -> None:
        calls.append(name)
        clock[0] += 1e-3 * cost(name, calls.count(name))

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    contenders = {name: functools.partial(call, name) for name in ("cpu", "reference", "dense")}
    return dispatch._race(contenders, torch.device("cpu")), calls


def test_an_interruption_decides_no_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was interrupted at the first call, or stood in a slow second of the machine, is fastest all the same."""
    usual = {"cpu": 0.2, "reference": 0.5, "dense": 0.4}
    times, _ = raced(monkeypatch, lambda name, call: usual[name] + (5.0 if (name, call) == ("cpu", 2) else 0.0))
    assert times == pytest.approx(usual)
    moments = iter(range(10**6))
    times, _ = raced(monkeypatch, lambda name, call: usual[name] * (8.0 if next(moments) < 6 else 1.0))
    assert times == pytest.approx(usual)


def test_who_is_out_of_reach_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    times, calls = raced(monkeypatch, lambda name, call: {"cpu": 1.0, "reference": 9.0, "dense": 2000.0}[name])
    assert times == pytest.approx({"cpu": 1.0, "reference": 9.0, "dense": 2000.0})
    assert (calls.count("dense"), calls.count("reference")) == (2, 3)


def test_what_the_file_says_decides(cache: Path) -> None:
    index = layer().index
    choose(index, "auto", tokens=32, dtype=torch.float32)
    (path,) = cache.rglob("timings-*.json")
    recorded = json.loads(path.read_text())
    for timings in recorded["milliseconds"].values():
        timings["forward"] = {"cpu": 2.0, "reference": 3.0, "dense": 1.0, "dense_onednn": 4.0}
        timings["dgrad"] = {"cpu": 1.0, "reference": 3.0, "dense": 3.0, "dense_onednn": 2.0}
        timings["wgrad"] = {"cpu": 2.0, "reference": 1.0, "dense": 3.0, "dense_onednn": 4.0}
    path.write_text(json.dumps(recorded))
    dispatch._Table._memory.clear()
    decision = choose(index, "auto", tokens=32, dtype=torch.float32)
    assert decision.choice == ("dense", "cpu", "reference")
    gained = {name: (product.ms, product.speedup) for name, product in decision.record().by_name()}
    assert gained == {"forward": (1.0, 1.0), "dgrad": (1.0, 2.0), "wgrad": (1.0, 3.0)}
    assert choose(index, "dense", tokens=32, dtype=torch.float32).choice == ("dense", "dense_onednn", "dense")
    plan = plan_kernels({"layer": layer()}, tokens=32, dtype=torch.float32)
    assert plan.record.gain() == pytest.approx((1.0 + 2.0 + 3.0) / 3)
    assert list(plan.lines()) == [
        "kernels: forward dense x 1 (1.0 to 1.0 times dense); dgrad cpu x 1 (2.0 to 2.0 times dense); "
        "wgrad reference x 1 (3.0 to 3.0 times dense)"
    ]


def test_a_layer_of_its_own_chooses_for_about_so_many_tokens(cache: Path) -> None:
    """One token must not be computed by what is fastest for hundreds; a choice that was set stays."""
    made = layer()
    choose(made.index, "auto", tokens=1, dtype=torch.float32)
    choose(made.index, "auto", tokens=512, dtype=torch.float32)
    (path,) = cache.rglob("timings-*.json")
    recorded = json.loads(path.read_text())
    for key, timings in recorded["milliseconds"].items():
        fastest = "reference" if "/T1/" in key else "dense"
        for product in timings.values():
            product |= dict.fromkeys(product, 9.0) | {fastest: 1.0}
    path.write_text(json.dumps(recorded))
    dispatch._Table._memory.clear()
    chosen = []
    for tokens in (1, 512, 4096, 1, 300):
        made(torch.zeros(tokens, made.in_features))
        assert made.choice is not None
        chosen.append(made.choice.forward)
    assert chosen == ["reference", "dense", "dense", "reference", "dense"]
    plan_kernels({"layer": made}, tokens=512, dtype=torch.float32)
    for tokens in (1, 512):
        made(torch.zeros(tokens, made.in_features))
        assert made.choice == ("dense",) * 3


def test_a_recipe_may_name_the_kernels(cache: Path) -> None:
    for name in ("cpu", "reference"):
        plan = plan_kernels({"layer": (made := layer(name))}, tokens=32, dtype=torch.float32)
        assert made.choice == (name,) * 3
        assert plan.record.to_json()["layers"]["layer"]["forward"] == {"backend": name, "ms": None, "speedup": None}
        assert plan.record.gain() is None
    assert not list(cache.rglob("timings-*"))  # nothing was left to measure
    assert set(choose(layer().index, "dense", tokens=8, dtype=torch.bfloat16).choice) <= set(DENSE)
    with pytest.raises(
        KernelError, match=r"^expected kernels that can run here, found triton: .*; choose auto$"
    ) as error:
        plan_kernels({"layer": layer("triton")}, tokens=32, dtype=torch.float32)
    assert "\n" not in str(error.value)
    with pytest.raises(KernelError, match=r"do not compute in torch.float64; choose auto"):
        layer("cpu").double()(torch.zeros(1, 96, dtype=torch.float64))


def with_backend(record: KernelRecord, layer: str, backend: str) -> KernelRecord:
    """A checkpoint's record, in which a layer ran on another backend."""
    found = json.loads(json.dumps(record.to_json()))
    for product in PRODUCTS:
        found["layers"][layer][product]["backend"] = backend
    return KernelRecord.from_json(found)


def test_a_resumed_run_keeps_its_kernels_where_it_can(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {"first": layer(), "second": layer()}
    fresh = plan_kernels(layers, tokens=32, dtype=torch.float32)
    stored = with_backend(fresh.record, "second", "reference")
    again = plan_kernels(layers, tokens=32, dtype=torch.float32, stored=stored)
    assert again.record == stored
    assert not again.notes
    assert layers["second"].choice == ("reference",) * 3
    moved = plan_kernels(layers, tokens=32, dtype=torch.float32, stored=with_backend(fresh.record, "second", "triton"))
    assert moved.record == fresh.record
    (note,) = moved.notes
    assert note.startswith("1 layers go on with other kernels than before: ")
    stored = with_backend(fresh.record, "second", "abacus")
    (note,) = plan_kernels(layers, tokens=32, dtype=torch.float32, stored=stored).notes
    assert note.endswith("this version has no kernels 'abacus'")
    named = {"first": layer("reference"), "second": layer("reference")}
    (note,) = plan_kernels(named, tokens=32, dtype=torch.float32, stored=fresh.record).notes
    assert note == "2 layers go on with other kernels than before: the recipe asks for reference"


def test_on_another_device_or_dtype_the_kernels_are_chosen_anew(cache: Path) -> None:
    layers = {"layer": layer()}
    fresh = plan_kernels(layers, tokens=32, dtype=torch.float32).record
    stored = with_backend(fresh, "layer", "dense")
    for place in ({"dtype": "torch.bfloat16"}, {"device": "NVIDIA H100"}):
        plan = plan_kernels(layers, tokens=32, dtype=torch.float32, stored=stored.model_copy(update=place))
        assert plan.record == fresh
        (note,) = plan.notes
        assert next(iter(place.values())) in note


def test_other_vectors_are_other_bits_and_one_line_says_so(cache: Path) -> None:
    layers = {"layer": layer("cpu")}
    stored = plan_kernels(layers, tokens=32, dtype=torch.float32).record
    assert not plan_kernels(layers, tokens=32, dtype=torch.float32, stored=stored).notes
    vax = stored.model_copy(update={"instructions": "vax"})
    (note,) = plan_kernels(layers, tokens=32, dtype=torch.float32, stored=vax).notes
    assert note.startswith(f"the cpu kernels use {stored.instructions} here and used vax before")


# As dsbert writes it into state.json.
NEWEST = {
    "tokens": 64,
    "dtype": "torch.float32",
    "device": "cpu",
    "layers": {
        "x": {
            "forward": {"backend": "cpu", "ms": 0.5, "speedup": 4.0},
            "dgrad": {"backend": "dense", "ms": 1.0, "speedup": 1.0},
            "wgrad": {"backend": "cpu", "ms": 0.5, "speedup": 3.0},
        }
    },
    "instructions": "avx2",
}


@pytest.mark.parametrize("written", [NEWEST, {key: NEWEST[key] for key in ("tokens", "layers")}])
def test_a_record_comes_back_as_it_was_written(written: dict[str, object]) -> None:
    record = KernelRecord.from_json(json.loads(json.dumps(written)))
    assert json.dumps(record.to_json()) == json.dumps(written)
    assert record.gain() == pytest.approx((0.5 * 4 + 1.0 + 0.5 * 3) / 2.0)
    assert record.layers["x"].choice() == ("cpu", "dense", "cpu")


def test_an_older_record_says_nothing_of_the_place(cache: Path) -> None:
    layers = {"x": layer()}
    written = {key: NEWEST[key] for key in ("tokens", "layers")}
    plan = plan_kernels(layers, tokens=32, dtype=torch.bfloat16, stored=KernelRecord.from_json(written))
    assert not plan.notes
    assert layers["x"].choice == ("cpu", "dense", "cpu")


def test_timings_are_of_a_number_of_threads(cache: Path) -> None:
    threads, index = torch.get_num_threads(), layer().index
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            choose(index, "auto", tokens=32, dtype=torch.float32)
    finally:
        torch.set_num_threads(threads)
    paths = list(cache.rglob("timings-*.json"))
    assert len(paths) == 2
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in paths)


def plan_where_one_rank_has_no_compiler(directory: str) -> list[str]:
    from dsbert.cluster import process_group
    from dsbert.sparse.kernels.cpu import build

    rank = process_group.init(60).rank
    os.environ["DSBERT_CACHE"] = f"{directory}/{rank}"
    build.load.cache_clear()
    build.unavailable.cache_clear()
    if rank == 1:
        os.environ["PATH"] = os.environ["CXX"] = ""
    made = layer()
    plan = plan_kernels({"layer": made}, tokens=32, dtype=torch.float32)
    made(torch.zeros(2, 96)).sum().backward()
    with pytest.raises(KernelError) as error:
        plan_kernels({"layer": layer("cpu")}, tokens=32, dtype=torch.float32)
    assert made.choice is not None
    return [*made.choice, *plan.notes, str(error.value)]


@pytest.mark.slow
def test_what_one_rank_cannot_run_no_rank_runs(tmp_path: Path) -> None:
    first, second = run_distributed(plan_where_one_rank_has_no_compiler, 2, {"directory": str(tmp_path)})
    assert first == second
    *choice, note, error = first
    assert "cpu" not in choice
    for text in (note, error):
        assert "rank 1: no C++ compiler was found" in text


@pytest.mark.parametrize("kernels", ["cpu", "dense", "reference"])
@pytest.mark.parametrize("gelu", [False, True])
def test_torch_accepts_the_operators(kernels: str, gelu: bool) -> None:
    from dsbert.sparse.kernels import ops

    made = layer(kernels)
    made(torch.zeros(2, 96))
    assert made.choice is not None
    x = torch.randn(7, 96, requires_grad=True)
    index = (made.rows, made.cols, made.order, list(made.shape), list(made.choice))
    op = ops.linear_gelu if gelu else ops.linear
    torch.library.opcheck(op, (x, made.blocks, made.bias, *index))
    torch.library.opcheck(op, (x[:0], made.blocks, None, *index))
    if not gelu:
        dy = torch.randn(7, 64, requires_grad=True)
        torch.library.opcheck(ops.dgrad, (dy, made.blocks, *index))
        torch.library.opcheck(ops.wgrad, (dy, x, *index[:4], made.block_size, index[4]))
        torch.library.opcheck(ops.gelu_gradient, (dy, dy, index[4]))


def test_torch_compile_gives_the_same() -> None:
    made = torch.nn.Sequential(layer("cpu"), torch.nn.GELU(), layer("cpu", shape=(96, 64)))
    x = torch.randn(9, 96)
    made(x)
    results = []
    for run in (made, torch.compile(made, backend="aot_eager", fullgraph=True)):
        made.zero_grad()
        given = x.clone().requires_grad_()
        y = run(given)
        y.square().sum().backward()
        results.append([y.detach(), given.grad, *(parameter.grad.clone() for parameter in made.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_every_backend_is_registered() -> None:
    assert set(BACKENDS) == {name for names in dispatch.KERNELS.values() for name in names}
