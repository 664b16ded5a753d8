"""Compiles launches of the table for a card that is not there, and says what came of it.

    python -m tests.sparse.triton_compile [--all]

prints one line of JSON per kernel: what the tests look at. `ptxas` and `cuobjdump` are those that come with triton.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Container, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dsbert.sparse.kernels.triton_gpu.configs import TABLE, Config, Key, LinearConfig, WgradConfig
from dsbert.sparse.kernels.triton_gpu.launch import PRECISION, SUM_SIZE
from dsbert.sparse.kernels.triton_gpu.linear_kernel import linear_kernel
from dsbert.sparse.kernels.triton_gpu.wgrad_kernel import sum_parts_kernel, wgrad_kernel

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
DTYPES = {"half": ("bf16", "fp16"), "float": ("fp32",)}


@dataclass
class Compiled:
    """One kernel for one architecture; async_bytes are the sizes of its asynchronous copies."""

    kernel: str
    arch: int
    dtype: str
    block_size: int
    config: str
    products: list[str]
    async_bytes: list[int]
    shared_bytes: int
    registers: int
    stack_bytes: int


def compile_kernel(kernel: Any, arch: int, types: dict[str, str], constants: dict[str, Any], config: Any) -> Any:
    """Every pointer and every stride divisible by 16, as torch's allocations and BERT's sizes are."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [name for name in names if name not in constants and name.endswith(("_ptr", "_stride"))]
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return triton.compile(
        ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, attrs),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": config.warps, "num_stages": config.stages},
    )


def compile_linear(key: Key, config: LinearConfig, dtype: str, gelu: bool = False) -> Any:
    product, block_size, _, arch = key
    types = dict.fromkeys(("x_ptr", "values_ptr", "bias_ptr", "y_ptr", "gelu_ptr"), f"*{dtype}")
    types |= dict.fromkeys(("order_ptr", "places_ptr"), "*i32")
    constants = {
        "B": block_size, "TOKENS": config.tokens, "DEPTH": config.depth, "LINES": config.lines,
        "TRANSPOSED": product == "dgrad", "HAS_BIAS": product == "forward", "GELU": gelu,
        "CACHE": config.cache, "PRECISION": PRECISION, "UPCAST": False,
    }  # fmt: skip
    return compile_kernel(linear_kernel, arch, types, constants, config)


def compile_wgrad(key: Key, config: WgradConfig, dtype: str, rows: int = 256) -> Any:
    _, block_size, _, arch = key
    types = dict.fromkeys(("dy_ptr", "x_ptr"), f"*{dtype}") | {"out_ptr": "*fp32"}
    types |= dict.fromkeys(("order_ptr", "cols_ptr"), "*i32")
    constants = {
        "B": block_size, "WIDTH": config.width, "DEPTH": config.depth, "ROWS": rows,
        "CACHE": config.cache, "PRECISION": PRECISION, "UPCAST": False,
    }  # fmt: skip
    return compile_kernel(wgrad_kernel, arch, types, constants, config)


def describe(kernel: str, key: Key, dtype: str, config: Config | None, compiled: Any) -> Compiled:
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", cubin.name], check=True, capture_output=True, text=True
        ).stdout
    return Compiled(
        kernel=kernel,
        arch=key[3],
        dtype=dtype,
        block_size=key[1],
        config=str(config),
        products=sorted(set(re.findall(r"(?:wgmma\.mma_async|mma)\.sync\.aligned\.\S+", ptx))),
        async_bytes=sorted({int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\..*\], (\w+)", ptx)}),
        shared_bytes=compiled.metadata.shared,
        registers=int(re.findall(r"REG:(\d+)", usage)[-1]),
        # Where registers spill to.
        stack_bytes=int(re.findall(r"STACK:(\d+)", usage)[-1]) + int(re.findall(r"LOCAL:(\d+)", usage)[-1]),
    )


def compile_all(keys: list[Key], dtypes: Container[str]) -> Iterator[Compiled]:
    """These entries of the table, forward also with GELU, and the sum of parts for each architecture."""
    for key in keys:
        config = TABLE[key]
        for dtype in DTYPES[key[2]]:
            if dtype not in dtypes:
                continue
            if isinstance(config, LinearConfig):
                yield describe(key[0], key, dtype, config, compile_linear(key, config, dtype))
                if key[0] == "forward":
                    yield describe("forward_gelu", key, dtype, config, compile_linear(key, config, dtype, gelu=True))
            else:
                yield describe(key[0], key, dtype, config, compile_wgrad(key, config, dtype))
    for arch in sorted({key[3] for key in keys}):
        types = {"parts_ptr": "*fp32", "out_ptr": "*bf16"}
        config = WgradConfig(width=0, depth=0, stages=3)
        compiled = compile_kernel(sum_parts_kernel, arch, types, {"SIZE": SUM_SIZE}, config)
        yield describe("sum_parts", ("wgrad", 0, "half", arch), "bf16", None, compiled)


def few(key: Key) -> bool:
    """What continuous integration has time for: bf16 for Hopper at every block size, a sample of the rest."""
    _, block_size, kind, arch = key
    return block_size == 64 if kind == "float" or arch != 90 else True


if __name__ == "__main__":
    everything = "--all" in sys.argv
    chosen = [key for key in TABLE if everything or few(key)]
    for result in compile_all(chosen, ("bf16", "fp16", "fp32") if everything else ("bf16", "fp32")):
        sys.stdout.write(json.dumps(asdict(result)) + "\n")
