"""The model in DeepSpeed: AdamW and deepspeed.initialize, without compiling CPU operators and without chatter."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from dsbert.base.errors import DsbertError, UserError
from dsbert.base.optional_triton import triton_hidden
from dsbert.base.own_time import counted_as_waiting
from dsbert.cluster.process_group import World
from dsbert.config.recipe import Recipe
from dsbert.engine.ds_config import precision
from dsbert.engine.zero_shards import full_shape, inner_optimizer, keep_minimal_loss_scale, set_adam_step

_COLLECTIVES = (
    "all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor", "broadcast",
    "all_gather", "all_gather_into_tensor", "all_gather_coalesced", "barrier",
)  # fmt: skip
_BUCKET_SIZE = 500_000_000  # DeepSpeed's default for zero_optimization.reduce_bucket_size, elements


def why_not_importable() -> str | None:
    """What DeepSpeed says where it cannot be imported, one line; None where it can."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        import deepspeed  # noqa: F401  # whether it can be is the question
    except Exception as error:  # of any type, where a compiler or a driver is odd
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def initialize(recipe: Recipe, model: nn.Module, config: dict[str, Any], world: World) -> Any:
    """deepspeed.initialize, without compiling its CPU operators and with its chatter on standard error.

    Raises UserError for a precision that the device lacks, or a configuration that cannot be used.
    """
    # DeepSpeed's affair, once a rank: torch 2.13 has renamed what it calls.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*reduce_scatter_tensor.*", category=FutureWarning)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if world.device.type == "cuda" else "cpu")
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    for handler in logger.handlers:
        if getattr(handler, "stream", None) is sys.stdout:
            handler.setStream(sys.stderr)
    if world.device.type == "cpu":
        # Otherwise built on first use, for minutes, and startup fails where there is no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_muon_uncompiled()
    chosen = precision(config)
    supported = {"fp16": get_accelerator().is_fp16_supported, "bf16": get_accelerator().is_bf16_supported}
    if chosen in supported and not supported[chosen]():
        raise UserError(
            f"expected a device that computes in {chosen} for deepspeed.config {recipe.deepspeed.config!r}, found "
            f"{world.device.type}: choose another precision, such as zero1_bf16 or zero1_fp32"
        )
    try:
        with triton_hidden():
            engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=_optimizer(recipe, model, world),
                config=_with_buckets_that_fit(config, model),
                dist_init_required=False,
            )
    except (DsbertError, OSError, MemoryError):
        raise
    except Exception as error:  # of any type, where options do not go together
        if isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError):
            raise  # of the machine or of a peer
        found = " ".join(str(error).split())
        raise UserError(
            f"expected a configuration that DeepSpeed accepts in {recipe.deepspeed}, found: {found}"
        ) from None
    # FP16_UnfusedOptimizer takes a step on zero gradients when it is built, which would shift the bias correction; the
    # rate was 0, so that the weights did not move.
    if inner_optimizer(engine).state:
        set_adam_step(engine, 0)
    keep_minimal_loss_scale(engine)
    _count_waits()
    return engine


def _count_waits() -> None:
    """Have DeepSpeed's collectives stop the clock of a rank's own time. Whatever it calls them for, they go through one
    object of the process, whose methods are replaced by ones that do the same."""
    from deepspeed.comm import comm

    for name in _COLLECTIVES:
        if name not in vars(comm.cdb) and hasattr(comm.cdb, name):
            setattr(comm.cdb, name, counted_as_waiting(getattr(comm.cdb, name)))


def _with_buckets_that_fit(config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The configuration with a bucket for gradients no larger than all of them.

    ZeRO makes a buffer of reduce_bucket_size elements with every micro-batch: by default 2 GB, of which a small model
    fills a corner. Memory that stays with the process (base/malloc.py) is laid out around it, and what lies between is
    touched bit by bit: a rank of the demo came to hold 2 GB in 800 steps. What is reduced together stays the same.
    """
    zero = dict(config.get("zero_optimization", {}))
    numel = sum(full_shape(parameter).numel() for parameter in model.parameters())
    zero["reduce_bucket_size"] = min(int(zero.get("reduce_bucket_size", _BUCKET_SIZE)), numel)
    return config | {"zero_optimization": zero}


def _import_muon_uncompiled() -> None:
    """DeepSpeed imports its Muon optimizer with every ZeRO stage, where torch.compile decorates functions; for this
    torch imports its compiler: three seconds of each start, for an optimizer that dsbert does not use."""
    compile_function = torch.compile
    torch.compile = lambda function=None, **options: function or (lambda inner: inner)  # type: ignore[assignment]
    try:
        with suppress(ImportError):
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        torch.compile = compile_function


def _optimizer(recipe: Recipe, model: nn.Module, world: World) -> torch.optim.Optimizer:
    """AdamW without decay on biases and LayerNorm; the rate is set at every step."""
    optim = recipe.optim
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for param in model.parameters():
        (decay if len(full_shape(param)) > 1 else no_decay).append(param)
    groups: list[dict[str, Any]] = [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups,
        lr=0.0,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=True,  # on a CPU as well: one pass over weights and moments instead of ten
    )
