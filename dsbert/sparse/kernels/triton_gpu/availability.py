"""Whether the Triton kernels can run on a device, and if not, why."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch

from dsbert.sparse.kernels.trust import UntrustedError, assert_trusted

BLOCK_SIZES = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The first with bf16 and cp.async.
LOWEST_CAPABILITY = (8, 0)


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors: for tests. Triton binds it when imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def why_not(device: torch.device, dtype: torch.dtype, block_size: int) -> str | None:
    """Why the kernels cannot run with blocks of this size and dtype on this device, one line, or None if they can."""
    if block_size < BLOCK_SIZES[0]:
        return f"block size {block_size} is below {BLOCK_SIZES[0]}"
    if block_size not in BLOCK_SIZES:
        return f"block size {block_size} is none of {', '.join(map(str, BLOCK_SIZES))}"
    if dtype not in DTYPES:
        return f"{str(dtype).removeprefix('torch.')} is none of float32, bfloat16, float16"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu" and interpreting():
        return None
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return f"needs a CUDA device, found {device.type if device.type != 'cuda' else 'none'}"
    capability = torch.cuda.get_device_capability(device)
    if capability < LOWEST_CAPABILITY:
        return f"needs compute capability 8.0 or more, found {capability[0]}.{capability[1]}"
    return _why_no_cache()


def _why_no_cache() -> str | None:
    """Triton loads what it finds in its cache, whoever put it there."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    cache = os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton", "cache")
    try:
        assert_trusted(Path(cache).resolve())
    except UntrustedError as error:
        return (
            f"triton's cache is not safe, {error.strerror}: set TRITON_CACHE_DIR to a folder that only you may write to"
        )
    except OSError:  # one that cannot be seen is triton's to complain about
        pass
    return None
