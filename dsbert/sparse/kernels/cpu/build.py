"""Compile the CPU kernels on first use, for the instruction set of this machine, and load them.

The compiled library is kept in the cache directory under a name that says what it was made from, so that another
source, compiler or machine never meets it. `DSBERT_CPU_ISA` asks for another instruction set. What another user could
have written is not loaded: then the library is compiled for this process alone.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch
import xxhash

from dsbert.sparse.kernels.cache import cache_directory, read_cached, whole_file
from dsbert.sparse.kernels.trust import UntrustedError, open_to_all, open_trusted, private_directory

SOURCE = "block_sparse.cpp"  # which includes every header beside it
# Best first. No -march=native: the flags are the name, and a cache may be shared by unlike machines.
ISA_FLAGS = {
    "avx512_bf16": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c",
    "avx2": "-mavx2 -mfma -mf16c",
    "plain": "",
}
_NEEDS = {
    "avx512_bf16": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx2": {"avx2", "fma", "f16c"},
    "plain": set(),
}
_FLAGS = [
    "-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast", "-w",
    "-fvisibility=hidden",  # several of them may be loaded in one process
]  # fmt: skip


class BuildError(Exception):
    """The kernels cannot be had here; the message is one line."""


def instruction_set() -> str:
    """The best of ISA_FLAGS that this machine has, or what DSBERT_CPU_ISA asks for. Raises BuildError for a name that
    is none."""
    asked = os.environ.get("DSBERT_CPU_ISA")
    if asked:
        if asked not in ISA_FLAGS:
            raise BuildError(f"expected DSBERT_CPU_ISA to be one of {', '.join(ISA_FLAGS)}, found {asked!r}")
        return asked
    found = _cpu_flags()
    return next(name for name in ISA_FLAGS if _NEEDS[name] <= found)


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        line = next((line for line in text.splitlines() if line.startswith("flags")), "")
        return set(line.partition(":")[2].split())
    except OSError:  # not Linux: what torch has found, without the rarer extensions
        capability = torch.backends.cpu.get_cpu_capability()
        return {"AVX512": _NEEDS["avx512"] | _NEEDS["avx2"], "AVX2": _NEEDS["avx2"]}.get(capability, set())


def compile_library(isa: str, directory: Path, extra: tuple[str, ...] = ()) -> Path:
    """The shared library for `isa` in `directory`, compiled unless it is there whole. Raises BuildError, one line."""
    compiler = _compiler()
    here = Path(__file__).parent
    flags = [*_FLAGS, *ISA_FLAGS[isa].split(), *extra]
    openmp = _openmp_of_torch()
    made_from = [*flags, compiler, _version(compiler), openmp or "", platform.machine()]
    hasher = xxhash.xxh3_64("\0".join(made_from).encode())
    for path in sorted([here / SOURCE, *here.glob("*.h")]):
        hasher.update(path.read_bytes())
    library = directory / f"block_sparse-{isa}-{hasher.hexdigest()}.so"
    if _is_whole(library):
        return library
    # One pool of threads, torch's: a second one would fight with it for the cores. Whoever comes first in the command
    # provides the symbols, and the compiler's own OpenMP is dropped as not needed.
    command = [compiler, *flags, str(here / SOURCE), *(["-Wl,--as-needed", openmp] if openmp else [])]
    try:
        with whole_file(library) as temporary:
            _compile([*command, "-o", str(temporary)])
            _seal(temporary)
    except OSError as error:
        raise BuildError(f"the cache {directory} cannot be written: {error.strerror}; set DSBERT_CACHE") from None
    return library


def _compiler() -> str:
    """CXX, g++ or clang++. Where PATH names folders relative to the working directory, a stranger's files may stand
    there: these are left out. Raises BuildError."""
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    path = os.pathsep.join(filter(os.path.isabs, folders))
    found = [shutil.which(name, path=path) for name in (os.environ.get("CXX", ""), "g++", "clang++")]
    compiler = next(filter(None, found), None)
    if compiler is None:
        raise BuildError("no C++ compiler was found: install g++, or set CXX")
    if open_to_all(Path(compiler)):
        raise BuildError(f"any user may replace the C++ compiler {compiler}: set CXX to another")
    return compiler


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} could not be run: {error}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise BuildError(f"{command[0]} failed: {(lines or ['no message'])[0].strip()}")


# A library that lost its end, to a power cut or a full disk, would kill whoever loads it: a checksum stands behind what
# the loader reads.


def _seal(library: Path) -> None:
    with library.open("r+b") as file:
        digest = xxhash.xxh3_64(file.read()).digest()
        file.write(digest)


def _is_whole(library: Path) -> bool:
    """Also that it is ours: another user's is compiled again, and replaced."""
    try:
        content = read_cached(library)
    except OSError:
        return False
    return xxhash.xxh3_64(content[:-8]).digest() == content[-8:]


def _loaded(library: Path) -> ctypes.CDLL:
    """The library by the descriptor that was looked at, which stays open: the loader knows libraries by their names."""
    try:
        descriptor = open_trusted(library)
        return ctypes.CDLL(f"/proc/self/fd/{descriptor}" if os.path.exists("/proc/self/fd") else str(library))
    except OSError as error:
        raise BuildError(f"{library} could not be loaded: {error}") from None


def _version(compiler: str) -> str:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{compiler} could not be run: {error}") from None


def _openmp_of_torch() -> str | None:
    """The GNU OpenMP library that torch has loaded, if it is one."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    paths = (line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line)
    return next((path for path in paths if os.path.isfile(path)), None)


@functools.cache
def unavailable() -> str | None:
    """Why the kernels cannot be had in this process, one line; None if they can. Asked often, tried once."""
    try:
        load()
    except BuildError as error:
        return str(error)
    return None


def remark() -> str | None:
    """What a user should know about how `load` came by the kernels, one line."""
    return next(iter(_remarks), None)


_remarks: list[str] = []


@functools.cache
def load() -> ctypes.CDLL:
    """The kernels for this machine, compiled on the first call ever (seconds). Raises BuildError, one line."""
    _remarks.clear()
    try:
        loaded = _loaded(compile_library(instruction_set(), cache_directory()))
    except UntrustedError as error:
        loaded = _compiled_for_this_process(str(error.strerror))
    except OSError as error:
        raise BuildError(f"no cache for compiled kernels, {error.strerror}: set DSBERT_CACHE") from None
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    loaded.dsbert_product.argtypes = [
        number, pointer, size, *[pointer] * 7, size, size, size, number, number, number,
    ]  # fmt: skip
    loaded.dsbert_gradient.argtypes = [
        number, pointer, size, pointer, size, *[pointer] * 4, size, size, size, size, number, number,
    ]  # fmt: skip
    loaded.dsbert_gelu_gradient.argtypes = [number, pointer, pointer, pointer, size, number]
    loaded.dsbert_dropout.argtypes = [number, pointer, pointer, size, ctypes.c_uint64, ctypes.c_double, number]
    drawn = (ctypes.c_uint64, ctypes.c_double, number, number)
    loaded.dsbert_norm.argtypes = [number, *[pointer] * 8, size, size, ctypes.c_double, *drawn]
    loaded.dsbert_norm_gradient.argtypes = [number, *[pointer] * 9, size, size, *drawn]
    loaded.dsbert_cross_entropy.argtypes = [pointer, pointer, pointer, size, size, number, number]
    loaded.dsbert_attention.argtypes = loaded.dsbert_attention_gradient.argtypes = [pointer]
    for name in (
        *("product", "gradient", "gelu_gradient", "dropout", "attention", "attention_gradient"),
        *("norm", "norm_gradient", "cross_entropy"),
    ):
        getattr(loaded, f"dsbert_{name}").restype = None
    return loaded


def _compiled_for_this_process(why: str) -> ctypes.CDLL:
    try:
        with private_directory() as directory:
            loaded = _loaded(compile_library(instruction_set(), directory))
    except OSError as error:
        raise BuildError(f"no safe cache for compiled kernels, {why}, and {error}: set DSBERT_CACHE") from None
    _remarks.append(
        f"the cache of compiled kernels is not used, {why}: they were compiled for this process alone; set "
        "DSBERT_CACHE to a folder that only you may write to"
    )
    return loaded
