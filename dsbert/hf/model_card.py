"""README.md of an export: what the model is, what it was trained on and how far, and how to load it.

Its last line holds a digest of what stands above, so that a later export can tell its own card from one that somebody
has written or changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from dsbert.base.durable import read_regular
from dsbert.base.errors import UserError, printable
from dsbert.base.jsonl import JsonlFile
from dsbert.data.manifest import load_manifest

if TYPE_CHECKING:
    from dsbert.checkpoint.restore import Restored

CARD = "README.md"
_MARK = "<!-- dsbert export "
_HEAD = """---
library_name: transformers
pipeline_tag: fill-mask
tags: [dsbert, {architecture}, fill-mask, sparse, block-sparse]
---

"""
_LOAD_DENSE = """```python
import transformers

model = transformers.{model_class}.from_pretrained("PATH OR NAME")
fill = transformers.pipeline("fill-mask", model="PATH OR NAME")
```

Pruned weights are zeros here: any version of transformers loads the model, and computes it as a dense one.
"""
_LOAD_SPARSE = """```python
import dsbert.hf  # pip install dsbert
import transformers

model = transformers.AutoModelForPreTraining.from_pretrained("PATH OR NAME")
fill = transformers.pipeline("fill-mask", model="PATH OR NAME")
embed = dsbert.hf.SentenceEmbedder.from_pretrained("PATH OR NAME").encode
```

Only the active blocks are in the file, and only they are computed. transformers knows the model once dsbert.hf is
imported.
"""


def model_card(restored: Restored, form: str, model_class: str, source: Path) -> str:
    """README.md in Markdown. form: "dense" or "sparse"; model_class: the name of the class that was saved; source: the
    run or checkpoint that was named, whose metrics.jsonl has the losses."""
    recipe = restored.recipe
    load = _LOAD_SPARSE if form == "sparse" else _LOAD_DENSE
    sections = {
        "Use": [load.replace("{model_class}", model_class)],
        "Model": [_table(_shape(restored))],
        "Training data": [_table(_data(restored))],
        "Training": [_table(_training(restored))],
        "Losses": [_table(_losses(restored, source))],
    }
    title = f"# {_plain(recipe.name)}, step {restored.state.step}\n\n"
    kind = "dense" if recipe.sparsity.pattern == "dense" else f"{recipe.sparsity.pattern} block-sparse"
    lead = f"A {recipe.model.architecture} encoder with {kind} weights, pre-trained by dsbert. The {form} form.\n"
    parts = [f"\n## {name}\n\n{''.join(parts)}" for name, parts in sections.items()]
    text = _HEAD.replace("{architecture}", recipe.model.architecture) + title + lead + "".join(parts)
    return text + f"\n{_MARK}{_digest(text)}: a later export replaces this file unless it was changed -->\n"


def is_as_written(path: Path) -> bool:
    """Whether a file is a card as `model_card` has made it, to the letter."""
    try:
        text = read_regular(path).decode()
    except (OSError, UnicodeDecodeError):
        return False
    body, mark, rest = text.rpartition(f"\n{_MARK}")
    return bool(mark) and rest.startswith(f"{_digest(body)}:") and rest.endswith("-->\n") and rest.count("\n") == 1


def _digest(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())


def _shape(restored: Restored) -> Iterator[tuple[str, object]]:
    model, sparsity, state = restored.recipe.model, restored.recipe.sparsity, restored.state
    config: Any = restored.model.config
    yield "layers, hidden size, heads", f"{model.num_layers}, {model.hidden_size}, {model.num_heads}"
    yield "longest input, tokens", config.max_position_embeddings
    yield "vocabulary", state.vocab_size
    yield "parameters", sum(param.numel() for param in restored.model.parameters())
    weights = sum(entry.out_in[0] * entry.out_in[1] for entry in state.layers.values())
    kept = sum(entry.kept for entry in state.layers.values())
    yield "encoder weights kept", f"{kept} of {weights} ({kept / weights:.4f})" if weights else "none"
    if restored.layers:
        yield "blocks", f"{sparsity.block_size} x {sparsity.block_size}, sparsity {sparsity.sparsity:g}"
        yield "low-rank term beside the blocks", f"rank {sparsity.low_rank}" if sparsity.low_rank else "none"


def _data(restored: Restored) -> Iterator[tuple[str, object]]:
    """Names of sources without their folders, which are nobody else's business."""
    data, digest = restored.recipe.data, restored.state.identity.data_digest
    yield "name", Path(data.path).name
    yield "digest", digest
    yield "tokens in a sample", data.seq_len
    try:
        manifest = load_manifest(data.path)
    except UserError:  # moved, or on another machine
        return
    if manifest.digest == digest:
        yield "sources", ", ".join(Path(entry.name).name for entry in manifest.request.sources)
        train = manifest.splits["train"]
        yield "documents, tokens to train on", f"{train.documents}, {train.tokens}"


def _training(restored: Restored) -> Iterator[tuple[str, object]]:
    from dsbert.models.construction import recipe_flops

    recipe, state = restored.recipe, restored.state
    totals = state.totals
    yield "steps", f"{state.step} of {recipe.optim.total_steps}, of {recipe.batch.global_batch} samples"
    yield "precision", state.precision
    yield "tokens", f"{totals.tokens:.4g}"
    of_dense = f", {totals.flops / totals.flops_dense:.3f} of the dense model's" if totals.flops_dense else ""
    yield "FLOPs of encoder and attention", f"{totals.flops:.4g}{of_dense}"
    # A third of training's: no backward.
    yield f"FLOPs of one input of {recipe.data.seq_len} tokens", f"{recipe_flops(recipe) / 3:.4g}"


def _losses(restored: Restored, source: Path) -> Iterator[tuple[str, object]]:
    """Held out, as last measured up to the checkpoint's step."""
    found: dict[str, Any] = {}
    for folder in (source, restored.path.parent.parent):
        try:
            records = JsonlFile(folder / "metrics.jsonl").read(skip_garbled=True)
        except OSError:
            records = []
        for record in records:
            numbers = {name: value for name, value in record.items() if type(value) in (int, float)}
            measured = {name: value for name, value in numbers.items() if name.startswith("val_")}
            if measured and numbers.get("step", math.inf) <= restored.state.step:
                found = {"held-out text, measured at step": numbers["step"]} | measured
        if found:
            break
    for name, value in found.items():
        yield _LOSS_NAMES.get(name, name), f"{value:.4f}" if isinstance(value, float) else value
    if not found:
        yield "held-out text", "not measured"


_LOSS_NAMES = {
    "val_mlm_loss": "masked tokens, nats per token",
    "val_mlm_accuracy": "masked tokens, share that is right",
    "val_nsp_loss": "next sentence, nats per pair",
}


def _table(rows: Iterator[tuple[str, object]]) -> str:
    lines = [f"| {name} | {_plain(value)} |" for name, value in rows]
    return "\n".join(["| | |", "| --- | --- |", *lines]) + "\n"


def _plain(value: object) -> str:
    """As it is: names of strangers are not to be Markdown, nor HTML."""
    return printable(value).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("`", "'")
