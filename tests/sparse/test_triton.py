"""The Triton kernels without a card: numbers from Triton's interpreter, machine code from its compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dsbert.sparse.kernels.index import PRODUCTS
from dsbert.sparse.kernels.triton_gpu import BACKEND, why_not
from dsbert.sparse.kernels.triton_gpu.configs import (
    ARCHITECTURES,
    KINDS,
    TABLE,
    LinearConfig,
    config_of,
    forget_measured,
    set_config,
)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
# Bytes of shared memory that a block of threads may have: H100; the smallest card of the 8.x family.
SHARED_BYTES = {90: 232448, 80: 101376}
# Share of the largest entry. bf16: the interpreter cuts mantissas off where a card rounds, so up to 2^-7.
LIMITS = {"repeated": 0.0, "unequal": 0.06}  # unequal: rounded the other way, since erf differs in its last bits
TOLERANCES = {"fp32": 1e-6, "fp16": 1e-3, "bf16": 8e-3}


def run(module: str, *words: str, **environment: str) -> str:
    command = [sys.executable, "-W", "ignore", "-m", module, *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads(run("tests.sparse.triton_interpreted", TRITON_INTERPRET="1"))
    return found


def test_products_equal_float64(interpreted: dict[str, dict[str, float]]) -> None:
    assert len(interpreted) >= 30
    for case, errors in interpreted.items():
        for what, error in errors.items():
            allowed = LIMITS.get(what, TOLERANCES[case.split()[0]]) if case != "fp32 gelu" else 1e-7
            assert error <= allowed, (case, what, error)


def check(compiled: dict[str, Any]) -> None:
    name = f"{compiled['kernel']} {compiled['dtype']} B={compiled['block_size']} sm_{compiled['arch']}"
    assert compiled["stack_bytes"] == 0, f"{name} spills"
    assert compiled["shared_bytes"] <= SHARED_BYTES[compiled["arch"]], name
    if compiled["kernel"] == "sum_parts":
        return
    instruction = "wgmma.mma_async." if compiled["arch"] == 90 else "mma."
    assert compiled["products"], f"{name} has no tensor core in it"
    assert all(product.startswith(instruction) for product in compiled["products"]), (name, compiled["products"])
    # Narrower copies mean that the compiler no longer sees how the gathered columns lie.
    assert compiled["async_bytes"] == [16], (name, compiled["async_bytes"])


def test_compiled_for_cards(tmp_path: Path) -> None:
    """Tensor cores of the generation, 16-byte asynchronous copies, shared memory in bounds, no spills."""
    lines = run("tests.sparse.triton_compile", TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    kernels = [json.loads(line) for line in lines]
    hopper = {(kernel["kernel"], kernel["block_size"]) for kernel in kernels if kernel["arch"] == 90}
    assert {(name, size) for name in (*PRODUCTS, "forward_gelu") for size in (16, 32, 64, 128)} <= hopper
    assert any(kernel["arch"] == 80 for kernel in kernels)
    for kernel in kernels:
        check(kernel)


@pytest.mark.exhaustive
def test_the_whole_table_compiled_for_cards(tmp_path: Path) -> None:
    lines = run("tests.sparse.triton_compile", "--all", TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    # forward twice: with and without GELU. half: bf16 and fp16. And one sum of parts for each architecture.
    assert len(lines) == len(ARCHITECTURES) * (4 * 4 * 3 + 1)
    for line in lines:
        check(json.loads(line))


def test_the_table_is_complete() -> None:
    assert set(TABLE) == {
        (p, b, k, a) for p in PRODUCTS for b in (16, 32, 64, 128) for k in KINDS for a in ARCHITECTURES
    }


def test_what_was_measured_goes_before_the_table() -> None:
    cpu, other = torch.device("cpu"), LinearConfig(tokens=64, depth=64)
    set_config("forward", 16, torch.bfloat16, cpu, other)
    assert config_of("forward", 16, torch.float16, cpu) == other
    assert config_of("forward", 16, torch.float32, cpu) != other
    forget_measured()
    assert config_of("forward", 16, torch.bfloat16, cpu) == TABLE["forward", 16, "half", 90]


@pytest.mark.parametrize(
    ("device", "dtype", "block_size", "reason"),
    [
        ("cpu", torch.float32, 8, "block size 8 is below 16"),
        ("cpu", torch.float32, 256, "block size 256 is none of 16, 32, 64, 128"),
        ("cpu", torch.float64, 16, "float64 is none of float32, bfloat16, float16"),
        ("cpu", torch.bfloat16, 16, "needs a CUDA device, found cpu"),
    ],
)
def test_why_not(device: str, dtype: torch.dtype, block_size: int, reason: str) -> None:
    assert BACKEND.why_not(torch.device(device), dtype, block_size) == reason


def test_why_not_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert why_not(torch.device("cpu"), torch.float32, 16) == "triton is not installed"


@pytest.mark.parametrize(
    ("capability", "reason"),
    [((7, 5), "needs compute capability 8.0 or more, found 7.5"), ((8, 0), None), ((9, 0), None)],
)
def test_why_not_on_a_card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], reason: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert why_not(torch.device("cuda"), torch.bfloat16, 16) == reason


def test_triton_is_imported_only_when_it_is_used() -> None:
    code = "import sys, torch, dsbert.sparse.kernels.triton_gpu as t; assert 'triton' not in sys.modules; "
    code += "t.why_not(torch.device('cpu'), torch.float32, 16); assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_card(tmp_path: Path) -> None:
    """Every kernel against float64 in every dtype, and the products of whole layers."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tools/card_suite.py", "--out", str(tmp_path), "--only", "parity,products"]
    done = subprocess.run(
        [*command, "--minutes", "4"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "suite.jsonl").read_text().splitlines()]
    assert all(row["rel_error"] < 8e-3 for row in rows if row.get("backend") == "triton")
