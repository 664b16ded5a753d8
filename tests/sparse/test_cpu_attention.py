"""The C++ attention: sequences of any length, head sizes, strides, masks, windows, dropout, threads, instruction sets.
Everything against float64."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsbert.models import varlen_attention as module
from dsbert.models.varlen_attention import varlen_attention
from dsbert.sparse.kernels import cpu
from dsbert.sparse.kernels.cpu import build
from dsbert.sparse.kernels.cpu.attention import Attention, Gradients
from tests.sparse.test_cpu_kernels import ABLE, kernels_of

# Largest Frobenius error allowed. Half precisions are read and written once, and multiplied in fp32; pairs of bf16 are
# rounded within, too, and so is what the gradient takes from the result.
DTYPES = {torch.float32: 3e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
RAGGED = [1, 5, 33, 0, 130, 200]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 9},
    "hidden": {"hides": True, "scaling": 0.4},
    "dropout": {"p": 0.3, "seed": 2**40 + 7},
    "all": {"window": 20, "hides": True, "p": 0.1, "seed": 3, "scaling": -0.2},
}


def exact(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, of: Attention) -> tuple[Tensor, Gradients, Tensor]:
    """Result, gradients and logarithms of sums [h, T] in float64, every share in memory."""
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    results, sums, drawn = [], [], 0
    for first, end in itertools.pairwise(of.starts.tolist()):
        length, heads = end - first, q.shape[1]
        scores = torch.einsum("qhd,khd->hqk", q[first:end], k[first:end]) * of.scaling
        seen = torch.ones(length, length, dtype=torch.bool)
        if of.visible is not None:
            seen &= of.visible[first:end]
        if of.window >= 0:
            places = torch.arange(length)
            seen &= (places - places[:, None]).abs() <= of.window
        scores = scores.masked_fill(~seen, -torch.inf)
        sums.append(scores.logsumexp(-1).nan_to_num(neginf=0.0))
        shares = torch.where(seen.any(1)[:, None], scores, 0.0).softmax(-1) * seen.any(1)[:, None]
        count = heads * length**2
        if of.p:  # what falls is what would fall if the shares stood in memory, one sequence behind the other
            kept = cpu.dropout(torch.ones(drawn + count), of.p, of.seed)[drawn:]
            shares = shares * kept.double().view(shares.shape)
        drawn += count
        results.append(torch.einsum("hqk,khd->qhd", shares, v[first:end]))
    out = torch.cat(results)
    return out.detach(), Gradients(*torch.autograd.grad(out, (q, k, v), dout.double())), torch.cat(sums, -1).detach()


def check(
    lengths: list[int], heads: int, size: int, dtype: torch.dtype, tolerance: float, **options: Any
) -> tuple[Tensor, Gradients]:
    generator = torch.Generator().manual_seed(size + len(lengths))
    tokens = sum(lengths)
    q, k, v, dout = (torch.randn(tokens, heads, size, generator=generator).to(dtype) for _ in range(4))
    visible = torch.rand(tokens, generator=generator) > 0.4 if options.pop("hides", False) else None
    starts = torch.tensor([0, *itertools.accumulate(lengths)])
    of = Attention(starts, visible, **{"scaling": size**-0.5, **options})
    out, lse = of.forward(q, k, v)
    gradients = of.gradients(dout, q, k, v, out, lse)
    wanted, wanted_gradients, wanted_lse = exact(q, k, v, dout, of)
    assert (lse.double() - wanted_lse).abs().max() < 1e-5
    for name, found, want in (("out", out, wanted), *zip("qkv", gradients, wanted_gradients, strict=True)):
        assert found.dtype == dtype
        # A head of one dimension has gradients that nearly cancel.
        error = (found.double() - want).norm() / want.norm().clamp(min=1e-30)
        assert error < tolerance * (2 if size == 1 else 1), (name, size, options, float(error))
    return out, gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 16, 32, 48, 64, 80, 128])
def test_attention_within_ragged_sequences(size: int, dtype: torch.dtype) -> None:
    for options in OPTIONS.values():
        check(RAGGED, 3, size, dtype, DTYPES[dtype], **options)


@pytest.mark.parametrize("size", [3, 7, 20, 127])
def test_unusual_head_sizes(size: int) -> None:
    for dtype in DTYPES:
        check([17, 40], 2, size, dtype, DTYPES[dtype], **OPTIONS["all"])


@pytest.mark.parametrize("window", [-1, 1, 64, 600])
def test_long_sequences(window: int) -> None:
    """More keys than a tile has, and tiles that a window leaves out."""
    check([530, 257], 1, 24, torch.float32, DTYPES[torch.float32], window=window, p=0.1, seed=9)


@pytest.mark.parametrize("isa", [*ABLE[1:], "avx512_bf16 in plain vectors"])
def test_attention_on_every_instruction_set(
    isa: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With pairs, shares and their gradients are rounded to bf16 as well."""
    with kernels_of(isa, tmp_path_factory.getbasetemp(), monkeypatch) as emulated:
        for size, dtype in itertools.product((1, 20, 64, 80), DTYPES):
            for options in OPTIONS.values():
                check([1, 37, 150], 2, size, dtype, DTYPES[dtype] * (1.5 if emulated else 1), **options)


@pytest.mark.skipif(sys.platform != "linux" or "avx2" not in ABLE, reason="needs an x86 assembler")
@pytest.mark.parametrize(
    ("isa", "rows", "fma"), [("avx2", 6, "vfmadd"), ("avx512", 12, "vfmadd"), ("avx512_bf16", 12, "vdpbf16ps")]
)
def test_sums_stay_in_registers(isa: str, rows: int, fma: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    library = build.compile_library(isa, tmp_path_factory.getbasetemp() / "isas")
    code = subprocess.run(["objdump", "-d", "-C", str(library)], capture_output=True, text=True, check=True).stdout
    kind = "PairDot" if fma == "vdpbf16ps" else "FloatDot"
    pattern = rf"<void dsbert::tile_product<dsbert::{kind}, {rows}, .*>\(.*\)>:"
    functions = [text for text in code.split("\n\n") if re.search(pattern, text.strip().splitlines()[0])]
    assert len(functions) == 3  # by rows, from zero or not, and by steps
    for function in functions:
        lines = function.splitlines()
        products = [number for number, line in enumerate(lines) if fma in line]
        assert len(products) >= 12
        inner = lines[products[0] : products[-1] + 1]
        assert not [line for line in inner if "(%rsp" in line or "(%rbp" in line]
        assert all(("zmm" in line) == (isa != "avx2") for line in inner if fma in line)


def test_the_same_bits_for_any_number_of_threads() -> None:
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            out, gradients = check(RAGGED, 3, 32, torch.float32, 1e-5, **OPTIONS["dropout"])
            found.append([out, *gradients])
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operands_of_any_stride(dtype: torch.dtype) -> None:
    """One projection for all three; heads before tokens; every second number; a gradient that is one number."""
    torch.manual_seed(0)
    lengths, heads, size = [7, 30], 4, 20
    tokens = sum(lengths)
    of = Attention(torch.tensor([0, 7, 37]), None, 5, 0.1, 0.3)
    fused = torch.randn(tokens, 3, heads, size).to(dtype).unbind(1)
    heads_first = [torch.randn(heads, tokens, size).to(dtype).transpose(0, 1) for _ in range(3)]
    sparse = [torch.randn(tokens, heads, 2 * size).to(dtype)[:, :, ::2] for _ in range(3)]
    for q, k, v in (fused, heads_first, sparse):
        dout = torch.ones((), dtype=dtype).expand(tokens, heads, size)
        out, lse = of.forward(q, k, v)
        packed = (q.contiguous(), k.contiguous(), v.contiguous())
        assert torch.equal(out, of.forward(*packed)[0])
        expected = of.gradients(dout.contiguous(), *packed, out, lse)
        found = of.gradients(dout, q, k, v, out, lse)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert (out.double() - exact(*packed, dout, of)[0]).norm() < DTYPES[dtype] * out.double().norm()


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_shares_fall_as_they_should(p: float) -> None:
    """With V = 1 the result is the shares themselves; with Q = 0 they are alike."""
    length, heads = 128, 24
    starts = torch.tensor([0, length])
    q = torch.zeros(length, heads, length)
    values = torch.eye(length)[:, None].expand(-1, heads, -1)
    out, _ = Attention(starts, None, 11, p, 1.0).forward(q, q, values)
    kept = out != 0
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (length * (1 - p))))
    in_memory = cpu.dropout(torch.ones(heads, length, length), p, 11).transpose(0, 1) != 0
    assert torch.equal(kept, in_memory)
    assert not torch.equal(kept, Attention(starts, None, 12, p, 1.0).forward(q, q, values)[0] != 0)


def hashed(positions: np.ndarray, seed: int) -> np.ndarray:
    """`draw` of dropout.h."""
    u = np.uint32
    high = (positions >> np.uint64(32)).astype(u) + u(seed & 0xFFFFFFFF)
    h = positions.astype(u) * u(0x9E3779B1) ^ high
    h = (h ^ h >> u(16)) * u(0x7FEB352D)
    h = ((h ^ h >> u(15)) ^ u(seed >> 32)) * u(0x846CA68B)
    h = (h ^ h >> u(16)) * u(0x9E3779B1)
    return h ^ h >> u(15)


def test_draws_beyond_four_billion_shares() -> None:
    """A sequence so long that the places of its shares fill 32 bits but for a few, of which each token sees itself; in
    the next one the numbers begin anew, in the middle of a vector."""
    lengths, turn, p, seed = (65_532, 2350), 223, 0.5, 2**33 + 12345
    places = np.concatenate([np.arange(length, dtype=np.uint64) * np.uint64(length + 1) for length in lengths])
    places[lengths[0] :] += np.uint64(lengths[0] ** 2)
    assert int(places[lengths[0] + turn]) - turn % 4 < 2**32 < int(places[lengths[0] + turn])
    x = torch.ones(sum(lengths), 1, 1)
    of = Attention(torch.tensor([0, lengths[0], sum(lengths)]), None, seed, p, 1.0, window=0)
    out, lse = of.forward(x, x, x)
    stays = torch.from_numpy(hashed(places, seed) >= np.uint32(p * 2**32))
    assert torch.equal(out.flatten(), torch.where(stays, 2.0, 0.0))
    assert torch.equal(of.gradients(x, x, x, x, out, lse).value, out)


def test_backward_is_the_derivative_of_forward() -> None:
    """By differences along random directions, with dropout: whatever either of them draws."""
    torch.manual_seed(0)
    of = Attention(torch.tensor([0, 5, 45]), torch.rand(45) > 0.2, 77, 0.4, 0.3, 15)
    q, k, v, dout = (torch.randn(45, 2, 16) for _ in range(4))
    out, lse = of.forward(q, k, v)
    gradients = of.gradients(dout, q, k, v, out, lse)
    for place, gradient in enumerate(gradients):
        along = torch.randn(45, 2, 16)
        step = 1e-2
        ends = []
        for sign in (step, -step):
            moved = [x + sign * along if at == place else x for at, x in enumerate((q, k, v))]
            ends.append((of.forward(*moved)[0].double() * dout).sum())
        slope = (ends[0] - ends[1]) / (2 * step)
        assert abs(slope - (gradient.double() * along).sum()) < 2e-3 * gradient.norm() * along.norm() / 90**0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_that_see_nothing(dtype: torch.dtype) -> None:
    q, k, v, dout = (torch.full((20, 2, 16), value, dtype=dtype) for value in (2.0, -300.0, 1.0, 1.0))
    visible = torch.zeros(20, dtype=torch.bool)
    visible[:3] = True
    of = Attention(torch.tensor([0, 8, 20]), visible, 1, 0.1, 1.0, 2)
    out, lse = of.forward(q, k, v)
    gradients = of.gradients(dout, q, k, v, out, lse)
    assert not out[5:].any()
    assert out[:5].any()
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert not gradient[8:].any()
    assert not gradients.value[3:].any()


@pytest.mark.parametrize("operand", range(3))
def test_what_is_not_a_number_is_not_hidden(operand: int) -> None:
    """So that the step is skipped; and stays within its head and sequence."""
    tensors = [torch.randn(40, 2, 16) for _ in range(3)]
    tensors[operand][20, 1] = torch.nan
    of = Attention(torch.tensor([0, 10, 40]), None, 1, 0.1, 0.3)
    out, lse = of.forward(*tensors)
    q, k, v = tensors
    gradients = of.gradients(torch.ones(40, 2, 16), q, k, v, out, lse)
    touched = slice(20, 21) if operand == 0 else slice(10, 40)
    assert out[touched, 1].isnan().any(-1).all()
    assert out[:10].isfinite().all()
    assert out[:, 0].isfinite().all()
    seen = (gradients.query, gradients.key) if operand == 2 else (gradients.value,)
    assert all(gradient[10:, 1].isnan().any() for gradient in seen)
    assert all(gradient[:, 0].isfinite().all() for gradient in gradients)


def test_large_scores_and_infinity() -> None:
    q = torch.full((3, 1, 16), 1e4)
    k = torch.tensor([1.0, -1.0, 0.5])[:, None, None].expand(3, 1, 16) * 1e4
    values = torch.eye(3, 16)[:, None]
    out, lse = Attention(torch.tensor([0, 3])).forward(q, k, values)
    torch.testing.assert_close(out, values[:1].expand(3, 1, 16), rtol=0.0, atol=1e-30)
    assert torch.allclose(lse, torch.full((1, 3), 16e8))
    infinite, _ = Attention(torch.tensor([0, 3])).forward(q * torch.inf, k, values)
    assert infinite.isnan().all()


def test_the_operator() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(12, 2, 8, requires_grad=True) for _ in range(3))
    starts, seed = torch.tensor([0, 4, 12]), torch.tensor(5)
    visible = torch.rand(12) > 0.3
    operands = (q, k, v, starts, visible, seed, 0.2, 0.3, 4)
    torch.library.opcheck(torch.ops.dsbert.varlen_attention.default, operands)
    torch.manual_seed(3)
    first = varlen_attention(q, k, v, starts, dropout=0.5)
    second = varlen_attention(q, k, v, starts, dropout=0.5)
    torch.manual_seed(3)
    assert torch.equal(first, varlen_attention(q, k, v, starts, dropout=0.5))
    assert not torch.equal(first, second)
    undropped = varlen_attention(q, k, v, starts)
    torch.manual_seed(3)
    assert torch.equal(undropped, varlen_attention(q, k, v, starts, dropout=0.0))
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(3)))  # nothing was drawn


@pytest.mark.parametrize(
    "options", [{}, {"window": 3}, {"visible": True}, {"window": 3, "visible": True, "scaling": 0.7}]
)
def test_without_the_kernel_torch_attends(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    starts = torch.tensor([0, 1, 6, 6, 26])
    visible = torch.rand(26) > 0.4 if options.pop("visible", False) else None
    operands = [torch.randn(26, 2, 16) for _ in range(4)]
    results = []
    for able in (True, False):
        if not able:
            monkeypatch.setattr(module, "has_kernel", lambda *_: False)
        q, k, v = (x.clone().requires_grad_() for x in operands[:3])
        out = varlen_attention(q, k, v, starts, visible=visible, **options)
        results.append([out, *torch.autograd.grad(out, (q, k, v), operands[3])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)
    wide = torch.randn(26, 1, 160)
    assert varlen_attention(wide, wide, wide, starts, dropout=0.2).shape == wide.shape
    assert varlen_attention(wide.double(), wide.double(), wide.double(), starts).dtype == torch.float64


@pytest.mark.parametrize("able", [True, False])
def test_no_tokens_at_all(able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_kernel", lambda *_: able)
    for starts in (torch.tensor([0]), torch.tensor([0, 0, 0])):
        q = torch.zeros(0, 2, 16, requires_grad=True)
        out = varlen_attention(q, q, q, starts, dropout=0.1)
        out.sum().backward()
        assert out.shape == (0, 2, 16)


def test_what_does_not_fit_is_refused() -> None:
    """The kernel would read what lies elsewhere."""
    q, starts = torch.zeros(6, 2, 8), torch.tensor([0, 6])
    cases: list[tuple[tuple[Tensor, ...], dict[str, Any], str]] = [
        (
            (q, q[:5], q, starts),
            {},
            r"expected a key as the query is, float32 \[6, 2, 8\] on cpu, found float32 \[5, 2, 8\]",
        ),
        ((q, q, q.half(), starts), {}, "expected a value .* found float16"),
        ((q, q, q, torch.tensor([0, 7])), {}, r"expected starts that ascend from 0 to 6, found \[0, 7\]"),
        ((q, q, q, torch.tensor([0, 4, 3, 6])), {}, "ascend"),
        ((q, q, q, torch.tensor([1, 6])), {}, "ascend"),
        ((q, q, q, torch.tensor([], dtype=torch.int64)), {}, r"expected starts \[n \+ 1\]"),
        ((q[0], q[0], q[0], starts), {}, r"expected a query \[T, h, d\]"),
        ((q, q, q, starts), {"visible": torch.ones(5, dtype=torch.bool)}, r"and visible \[5\]"),
    ]
    for operands, options, says in cases:
        with pytest.raises(ValueError, match=says):
            varlen_attention(*operands, **options)
