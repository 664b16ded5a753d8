"""The C++ kernels beyond what every backend must do (test_linear.py): instruction sets, threads, GELU, dropout, no
compiler. Everything against float64."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dsbert.sparse import BlockSparseLinear, BlockTopology, DrawKey
from dsbert.sparse.kernels import cpu
from dsbert.sparse.kernels.cpu import build
from dsbert.sparse.kernels.index import KernelIndex
from tests.sparse.toys import densify

DTYPES = {torch.float32: 3e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}  # largest Frobenius error allowed
ABLE = [name for name in build.ISA_FLAGS if build._NEEDS[name] <= build._cpu_flags()]


def forget() -> None:
    """As in a process that has not asked for the kernels yet."""
    build.load.cache_clear()
    build.unavailable.cache_clear()


@contextmanager
def kernels_of(isa: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """The kernels of an instruction set in the place of the machine's own. What is none stands for AVX-512 with its
    pairs of bf16, in vectors that the compiler splits and with arithmetic in the place of the instruction: whether it
    is that."""
    emulated = isa not in build.ISA_FLAGS
    extra = ("-DDSBERT_PAIRS", "-DDSBERT_LANES=16") if emulated else ()
    library = build.compile_library(ABLE[0] if emulated else isa, folder / "isas", extra)
    monkeypatch.setattr(build, "compile_library", lambda *_: library)
    forget()
    try:
        assert os.readlink(build.load()._name) == str(library)
        yield emulated
    finally:
        forget()


def topologies(shape: tuple[int, int], size: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Random, one block, full, one column, one row: rows and cols."""
    num_rows, num_cols = shape[0] // size, shape[1] // size
    drawn = BlockTopology.random(shape, size, 0.3, DrawKey(3, "init", 0, "x"))
    order = torch.randperm(drawn.num_active, generator=torch.Generator().manual_seed(3))
    every = torch.arange(num_rows * num_cols)
    found = {
        "random": (drawn.rows[order], drawn.cols[order]),
        "one block": (torch.tensor([num_rows - 1]), torch.tensor([0])),
        "full": (every // num_cols, every % num_cols),
        "one column": (torch.arange(num_rows), torch.full((num_rows,), num_cols - 1)),
        "one row": (torch.zeros(num_cols, dtype=torch.int32), torch.arange(num_cols)),
    }
    return {name: (rows.int(), cols.int()) for name, (rows, cols) in found.items()}


def check_products(shape: tuple[int, int], size: int, dtype: torch.dtype, tokens: int) -> None:
    generator = torch.Generator().manual_seed(size + tokens)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    for name, (rows, cols) in topologies(shape, size).items():
        index = KernelIndex.of(shape, size, rows, cols)
        x, dy, bias = random(tokens, shape[1]), random(tokens, shape[0]), random(shape[0])
        blocks = random(len(rows), size, size)
        weight = densify(shape, blocks.double(), rows, cols)
        y = x.double() @ weight.t() + bias.double()
        dense_gradient = (dy.double().t() @ x.double()).view(shape[0] // size, size, shape[1] // size, size)
        assert cpu.BACKEND.forward_gelu is not None
        activated, before = cpu.BACKEND.forward_gelu(x, blocks, index, bias)
        found = {
            "forward": (cpu.BACKEND.forward(x, blocks, index, bias), y),
            "before": (before, y),
            "gelu": (activated, functional.gelu(before.double())),
            "dgrad": (cpu.BACKEND.dgrad(dy, blocks, index), dy.double() @ weight),
            "wgrad": (cpu.BACKEND.wgrad(dy, x, index), dense_gradient.transpose(1, 2)[rows.long(), cols.long()]),
        }
        for product, (result, exact) in found.items():
            error = (result.double() - exact).norm() / exact.norm().clamp(min=1e-30)
            assert error < DTYPES[dtype], (name, product, float(error))
        wide = torch.zeros(tokens, shape[1] + 3, dtype=dtype)
        wide[:, 3:] = x  # rows further apart than they are long
        assert torch.equal(cpu.BACKEND.forward(wide[:, 3:], blocks, index, bias), found["forward"][0])
        assert torch.equal(cpu.BACKEND.wgrad(dy, wide[:, 3:], index), found["wgrad"][0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 4, 8, 16, 32, 64, 128])
def test_products_on_adversarial_topologies(size: int, dtype: torch.dtype) -> None:
    shape = (12, 20) if size == 1 else (size * 3, size * 5)
    for tokens in (1, 7, 101):
        check_products(shape, size, dtype, tokens)


@pytest.mark.parametrize("size", [2, 3, 24, 48, 144, 256])
def test_products_of_unusual_blocks(size: int) -> None:
    for dtype in DTYPES:
        check_products((size * 2, size * 3), size, dtype, 7)


@pytest.mark.parametrize("size", [16, 64])
def test_products_of_more_features_than_a_slice_holds(size: int) -> None:
    """Sums then wait for the next chunk of features, in y or, for half precisions, beside it."""
    for dtype in DTYPES:
        for shape in ((64, 3072), (3072, 64)):
            check_products(shape, size, dtype, 101)


@pytest.mark.parametrize("size", [4, 16, 32])
@pytest.mark.parametrize("isa", [*ABLE[1:], "avx512_bf16 in plain vectors"])
def test_products_on_every_instruction_set(
    isa: str, size: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What this machine can execute below its best; and the loops and layouts of the best."""
    with kernels_of(isa, tmp_path_factory.getbasetemp(), monkeypatch):
        for dtype in DTYPES:
            for tokens in (1, 50, 131):
                check_products((size * 3, size * 5), size, dtype, tokens)
            if size == 16:
                check_products((32, 3072), size, dtype, 50)


@pytest.mark.skipif(sys.platform != "linux" or "avx2" not in ABLE, reason="needs an x86 assembler")
@pytest.mark.parametrize(("isa", "fma"), [("avx2", "vfmadd"), ("avx512", "vfmadd"), ("avx512_bf16", "vdpbf16ps")])
def test_sums_stay_in_registers(isa: str, fma: str, tmp_path: Path) -> None:
    """Between the first and the last product of a slice the compiler must not put sums aside on the stack."""
    library = build.compile_library(isa, tmp_path)
    code = subprocess.run(["objdump", "-d", "-C", str(library)], capture_output=True, text=True, check=True).stdout
    kind = "PairDot" if fma == "vdpbf16ps" else "FloatDot"
    functions = [text for text in code.split("\n\n") if re.search(rf"<void dsbert::multiply<.*{kind}>\(.*\)>:", text)]
    assert functions
    for function in functions:
        lines = function.splitlines()
        products = [number for number, line in enumerate(lines) if fma in line]
        assert len(products) >= 96
        inner = lines[products[0] : products[-1] + 1]
        assert not [line for line in inner if "(%rsp" in line or "(%rbp" in line]
        assert all(("zmm" in line) == (isa != "avx2") for line in inner if fma in line)


@pytest.mark.parametrize("size", [1, 8, 16, 64])
def test_the_same_bits_for_any_number_of_threads(size: int) -> None:
    shape = (256, 384) if size > 1 else (48, 64)
    drawn = BlockTopology.random(shape, size, 0.2, DrawKey(5, "init", 0, "x"))
    index = KernelIndex.of(shape, size, drawn.rows, drawn.cols)
    x, dy, blocks = torch.randn(301, shape[1]), torch.randn(301, shape[0]), torch.randn(drawn.num_active, size, size)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            found.append(
                [
                    cpu.BACKEND.forward(x, blocks, index, None),
                    cpu.BACKEND.dgrad(dy, blocks, index),
                    cpu.BACKEND.wgrad(dy, x, index),
                    cpu.dropout(x, 0.3, 5),
                ]
            )
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


def test_gelu_and_its_derivative_everywhere() -> None:
    x = torch.cat([torch.linspace(-14, 14, 20001), torch.tensor([0.0, -0.0, 1e-30, 40.0, -40.0, 1e30, -1e30])])
    exact = x.double().requires_grad_()
    functional.gelu(exact).sum().backward()
    found = cpu.gelu_gradient(torch.ones_like(x), x)
    assert exact.grad is not None
    assert (found.double() - exact.grad).abs().max() < 4e-7
    index = KernelIndex.of((16, 16), 16, torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    padded = torch.zeros(-(-len(x) // 16) * 16)
    padded[: len(x)] = x
    assert cpu.BACKEND.forward_gelu is not None
    activated, before = cpu.BACKEND.forward_gelu(padded.view(-1, 16), torch.eye(16)[None], index, None)
    assert torch.equal(before.flatten()[: len(x)], x)
    error = (activated.flatten()[: len(x)].double() - functional.gelu(x.double())).abs()
    assert (error <= 3e-7 * x.double().abs().clamp(min=1e-30)).all()
    infinite = torch.tensor([float("inf"), -float("inf"), float("nan")])
    assert torch.equal(cpu.gelu_gradient(torch.ones(2), infinite[:2]), torch.tensor([1.0, 0.0]))
    assert cpu.gelu_gradient(torch.ones(1), infinite[2:]).isnan().all()


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_falls_as_it_should(p: float) -> None:
    count = 1 << 20
    x = torch.ones(count)
    masks = [cpu.dropout(x, p, seed) == 0 for seed in (1, 2, 1 << 32, (1 << 32) + 1, 2**63 - 1)]
    deviation = (p * (1 - p) / count) ** 0.5
    for mask in masks:
        assert abs(mask.double().mean().item() - p) < 5 * deviation
        for shift in (1, 2, 3, 8, 64, 768, 1024):  # neighbours in a row and in a column
            both = (mask[shift:] & mask[:-shift]).double().mean().item()
            assert abs(both - p * p) < 6 * deviation, shift
    for one in range(len(masks)):
        for other in range(one):
            assert abs((masks[one] & masks[other]).double().mean().item() - p * p) < 6 * deviation
    kept = cpu.dropout(x, p, 1)[~masks[0]]
    assert torch.allclose(kept, torch.full_like(kept, 1 / (1 - p)))
    assert torch.equal(cpu.dropout(x[:777], p, 1), cpu.dropout(x, p, 1)[:777])


WITHOUT_COMPILER = """
import os, torch
os.environ["PATH"], os.environ["CXX"] = "", ""
from dsbert.sparse import BlockSparseLinear, BlockTopology, DrawKey
from dsbert.sparse.kernel_plan import plan_kernels
layer = BlockSparseLinear(BlockTopology.random((64, 64), 16, 0.3, DrawKey(0, "init", 0, "x")))
plan = plan_kernels({"layer": layer}, tokens=32, dtype=torch.float32)
assert "cpu" not in layer.choice, layer.choice
layer(torch.randn(32, 64)).sum().backward()
print(*plan.notes, sep="\\n")
"""


def test_without_a_compiler_torch_computes_and_one_line_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER],
        env={"DSBERT_CACHE": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "the cpu kernels cannot be used, sparse products run through torch: "
        "no C++ compiler was found: install g++, or set CXX"
    ]


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"CXX": "false"}, "could not be run|failed"),
        (
            {"DSBERT_CPU_ISA": "vax"},
            "expected DSBERT_CPU_ISA to be one of avx512_bf16, avx512, avx2, plain, found 'vax'",
        ),
        ({"DSBERT_CACHE": "/proc/nowhere"}, "/proc/nowhere"),
    ],
)
def test_what_cannot_be_built_is_one_line(
    environment: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DSBERT_CACHE", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    forget()
    try:
        reason = cpu.BACKEND.why_not(torch.device("cpu"), torch.float32, 16)
    finally:
        forget()
    assert reason is not None
    assert "\n" not in reason
    assert re.search(says, reason)


def test_a_failed_build_is_tried_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Dropout asks at every call whether there are kernels."""
    tried = []

    def failing(*_: object) -> Path:
        tried.append(1)
        raise build.BuildError("broken")

    monkeypatch.setattr(build, "compile_library", failing)
    forget()
    try:
        for _ in range(3):
            assert cpu.BACKEND.why_not(torch.device("cpu"), torch.float32, 16) == "broken"
    finally:
        forget()
    assert len(tried) == 1


def test_a_library_that_lost_its_end_is_compiled_again(tmp_path: Path) -> None:
    """To load it would be a bus error."""
    library = build.compile_library("plain", tmp_path)
    whole = library.read_bytes()
    for torn in (b"", bytes(len(whole)), whole[:30000]):
        library.unlink()  # it is loaded: what is mapped must not be cut
        library.write_bytes(torn)
        assert not build._is_whole(library)
    assert build.compile_library("plain", tmp_path) == library
    assert library.stat().st_size == len(whole)
    ctypes.CDLL(str(library))
    assert library.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [library]


def test_without_a_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DSBERT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    forget()
    try:
        reason = cpu.BACKEND.why_not(torch.device("cpu"), torch.float32, 16)
        drawn = BlockTopology.random((16, 32), 16, 0.5, DrawKey(0, "init", 0, "x"))
        BlockSparseLinear(drawn)(torch.zeros(2, 32))
    finally:
        forget()
    assert reason == "no cache for compiled kernels, no home directory: set DSBERT_CACHE"


def test_shares_the_threads_of_torch() -> None:
    """A second OpenMP runtime would be a second pool of threads that fights for the cores."""
    build.load()
    torch.randn(512, 512) @ torch.randn(512, 512)
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert len({line.split()[-1] for line in maps.splitlines() if "libgomp" in line or "libomp" in line}) <= 1
    assert isinstance(build.load(), ctypes.CDLL)
