"""What a run says of itself before its first step, in lines for people."""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from dsbert.checkpoint.state import RunRecord
from dsbert.config.recipe import Recipe
from dsbert.engine.ds_config import config_label
from dsbert.training.wandb_mode import wandb_mode

_RULES = {"eq3": "eq. 3", "inverse": "1/density", "inverse_sqrt": "1/sqrt(density)"}
_DECAYS = {
    "linear": lambda optim: "",
    "cosine": lambda optim: " and cosine decay",
    "wsd": lambda optim: f" and the last {optim.num_decay_steps} of decay",
}
_MOST_HOSTS = 4  # that are named


def opening_lines(recipe: Recipe, record: RunRecord, hosts: Sequence[str], run_dir: Path) -> Iterator[str]:
    """hosts: by rank."""
    yield _what(recipe)
    yield _batches(recipe, len(hosts))
    yield _where(record, hosts)
    yield _records(recipe, run_dir)


def _what(recipe: Recipe) -> str:
    """Sparsity, rate and length."""
    sparsity, optim = recipe.sparsity, recipe.optim
    beside = f" and rank {sparsity.low_rank} beside" if sparsity.low_rank and sparsity.pattern != "dense" else ""
    rate = f"peak lr {recipe.peak_lr:.3g}"
    if optim.dense_lr is not None:
        rate += f" (dense {optim.dense_lr:.3g} x {recipe.peak_lr / optim.dense_lr:.2f}, {_RULES[optim.lr_rule]})"
    return (
        f"{recipe.name}: {sparsity.pattern}, density {sparsity.density:.3g}, block {sparsity.block_size}{beside}, "
        f"{rate}, {optim.total_steps} steps of {recipe.batch.global_batch} x {recipe.data.seq_len}, "
        f"{optim.warmup_steps} of warm-up{_DECAYS[optim.schedule](optim)}, {config_label(recipe)}"
    )


def _batches(recipe: Recipe, world_size: int) -> str:
    """What a step is on this many ranks, and how much of its room is empty where another size would leave less."""
    batch = recipe.batch
    size = batch.on_ranks(world_size).micro_batch
    accumulation_steps = -(-batch.global_batch // (size * world_size))
    note = f" (batch.micro_batch allows {batch.micro_batch})" if size < batch.micro_batch else ""
    even = -(-batch.global_batch // (world_size * accumulation_steps))
    if even < size:
        empty = 1 - batch.global_batch / (size * accumulation_steps * world_size)
        note = f" ({empty:.0%} of that is empty, less with batch.micro_batch={even})"
    ranks = f"{world_size} rank{'s'[: world_size > 1]}"
    batches = f"{accumulation_steps} micro-batch{'es'[: 2 * (accumulation_steps > 1)]}"
    return f"a step: {batch.global_batch} samples over {ranks}, {batches} of {size} on each{note}"


def _where(record: RunRecord, hosts: Sequence[str]) -> str:
    """Ranks, hosts, devices, parameters."""
    counts = list(Counter(hosts).items())  # ranks may go round the hosts
    named = ", ".join(f"{count} on {host}" for host, count in counts[:_MOST_HOSTS])
    if len(counts) > _MOST_HOSTS:
        named += f" and more on {len(counts) - _MOST_HOSTS} others"
    numerics = record.numerics or {}
    device, threads = numerics.get("device"), numerics.get("threads")
    of_threads = f", {threads} thread{'s'[: threads != 1]} each" if device == "cpu" else ""
    params = sum(math.prod(shape) for shape in record.params.values())
    kept = sum(layer.kept for layer in record.layers.values() if layer.block_size is not None)
    blocks = f", {kept:,} of them in blocks" if kept else ""
    return f"ranks: {named} ({device}{of_threads}); {params:,} parameters{blocks}"


def _records(recipe: Recipe, run_dir: Path) -> str:
    """Where to look meanwhile."""
    off = not recipe.log.wandb or os.environ.get("WANDB_MODE") == "disabled"
    mode = "off" if off else wandb_mode()[0]
    log = _log()
    return f"records: {run_dir / 'metrics.jsonl'}, W&B {mode}{f', log {log}' if log else ''}; `dsbert status {run_dir}`"


def _log() -> str | None:
    """The file that standard error goes to, where it goes to one and the system says which."""
    with suppress(OSError, ValueError):
        path = os.readlink(f"/proc/self/fd/{sys.stderr.fileno()}")
        if os.path.isfile(path):
            return path
    return None
