"""Inference on a CPU: the sparse model in transformers (dsbert.hf), and its dense export there with SDPA, in one run.

    python tools/bench_inference.py [--recipe bert-base] [--sentences 1,8,64] [--tokens 16,64,128,512] [--threads 1,2]
        [--task embedding,fill-mask] [--dtype fp32,bf16] [--ragged] [--seconds 2] [--json] [a.b=value ...]

A model of the recipe's shape and sparsity with weights at random, which take as long as any. Each row is one call with
so many sentences of so many tokens each; with --ragged they have from a quarter of these tokens up to all of them.
What is timed: embedding, mean pooling of the last hidden states; fill-mask, the logits of all positions, as
transformers computes them. Both models take turns for --seconds, at least three times each; times are medians of the
turns, and the largest difference of their outputs stands beside them. Every number of threads has a process of its
own. kernels: what computes the sparse layers' forward products of that many tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from on_ranks import markdown
from torch import Tensor

from dsbert.base.errors import UserError
from dsbert.base.malloc import keep_freed_pages
from dsbert.config.recipe import Recipe, load_recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TASKS = ("embedding", "fill-mask")
_VOCABULARY = 30522
_FEWEST_TURNS = 3


def _seconds() -> float:
    """Of this process with one thread, so that who shares its core counts as little as he can; else of the clock."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def models(recipe: Recipe, dtype: torch.dtype) -> dict[str, Any]:
    """The sparse model and the dense one with the same weights, both with the head for masked tokens."""
    import transformers

    from dsbert import hf
    from dsbert.hf.export_forms import dense_state
    from dsbert.hf.from_checkpoint import pretrained_of
    from dsbert.models.construction import build_model

    model, layers = build_model(recipe, _VOCABULARY)
    config: Any = model.config
    dense = transformers.BertForMaskedLM(config)
    dense.load_state_dict(dense_state(model, layers), strict=False)
    dense.set_attn_implementation("sdpa")
    found = {"sparse": pretrained_of(model, layers, hf.DsbertForMaskedLM), "dense": dense}
    return {name: each.to(dtype).eval() for name, each in found.items()}


def rows_of(sentences: int, tokens: int, ragged: bool) -> dict[str, Tensor]:
    """input_ids and attention_mask [sentences, tokens]."""
    lengths = (
        torch.linspace(tokens, max(1, tokens // 4), sentences).long() if ragged else torch.full((sentences,), tokens)
    )
    seen = torch.arange(tokens) < lengths[:, None]
    ids = torch.randint(5, _VOCABULARY, seen.shape)
    return {"input_ids": torch.where(seen, ids, 0), "attention_mask": seen.long()}


def calls(both: dict[str, Any], task: str, rows: dict[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    """By model: what is timed."""
    from dsbert.hf.sentence_embedder import mean_pooled

    def embedding(model: Any) -> Tensor:
        return mean_pooled(model.bert(**rows).last_hidden_state, rows["attention_mask"])

    def fill_mask(model: Any) -> Tensor:
        logits: Tensor = model(**rows).logits
        return logits

    call = embedding if task == "embedding" else fill_mask
    return {name: partial(call, model) for name, model in both.items()}


@torch.inference_mode()
def record(options: argparse.Namespace, both: dict[str, Any], dtype: str, task: str, rows: dict[str, Tensor]) -> Any:
    """One row: milliseconds of both, in turns."""
    timed = calls(both, task, rows)
    outputs = {name: call() for name, call in timed.items()}  # chooses kernels, too
    seen = rows["attention_mask"].bool()
    apart = outputs["sparse"] - outputs["dense"]
    apart = apart if task == "embedding" else apart[seen]
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    start = time.perf_counter()
    while len(seconds["dense"]) < _FEWEST_TURNS or time.perf_counter() - start < options.seconds:
        for name, call in timed.items():
            before = _seconds()
            call()
            seconds[name].append(_seconds() - before)
    ms = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
    return {
        "task": task,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "sentences": len(seen),
        "tokens": seen.shape[1],
        "dense_ms": round(ms["dense"], 2),
        "sparse_ms": round(ms["sparse"], 2),
        "times_dense": round(ms["dense"] / ms["sparse"], 2),
        "largest_difference": f"{float(apart.abs().max()):.1e}",
        "kernels": kernels(both["sparse"]),
    }


def kernels(model: Any) -> str:
    """Which backend computes how many layers' forward product."""
    from dsbert.sparse import BlockSparseLinear

    layers = (module for module in model.modules() if isinstance(module, BlockSparseLinear))
    count = Counter(layer.choice.forward for layer in layers if layer.choice is not None)
    return ", ".join(f"{name} x {number}" for name, number in count.most_common())


def records(options: argparse.Namespace, recipe: Recipe) -> list[Any]:
    """All rows of this number of threads."""
    torch.manual_seed(0)
    keep_freed_pages()  # for both alike
    found = []
    for dtype in options.dtype.split(","):
        both = models(recipe, DTYPES[dtype])
        for task in options.task.split(","):
            for sentences in map(int, options.sentences.split(",")):
                for tokens in map(int, options.tokens.split(",")):
                    rows = rows_of(sentences, tokens, options.ragged)
                    found.append(record(options, both, dtype, task, rows))
                    print(f"bench_inference: {found[-1]}", file=sys.stderr)
    return found


def main() -> None:
    """One table, or one list of records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="bert-base")
    parser.add_argument("--sentences", default="1,8,64", help="in a call, with commas")
    parser.add_argument("--tokens", default="16,64,128,512", help="of a sentence, with commas")
    parser.add_argument("--threads", default="1,2", help="with commas")
    parser.add_argument("--task", default="embedding,fill-mask", help="with commas")
    parser.add_argument("--dtype", default="fp32", help="of fp32, bf16, with commas")
    parser.add_argument("--ragged", action="store_true", help="sentences of different lengths")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", help="of the recipe: a.b=value")
    options = parser.parse_args()
    for names, known in ((options.dtype, DTYPES), (options.task, TASKS)):
        if unknown := {*names.split(",")} - {*known}:
            raise SystemExit(_complain(f"expected {', '.join(known)}, found {', '.join(unknown)}"))
    try:
        recipe = load_recipe(options.recipe, ["data.path=none", *options.overrides])
    except UserError as error:
        raise SystemExit(_complain(str(error))) from None
    threads = options.threads.split(",")
    if len(threads) == 1:
        torch.set_num_threads(int(threads[0]))
        rows = records(options, recipe)
    else:  # choices of kernels are those of a number of threads
        rows = [row for number in threads for row in _in_a_process(number)]
    print(json.dumps(rows) if options.json else markdown(rows))


def _in_a_process(threads: str) -> list[Any]:
    words = [word for word in sys.argv[1:] if word != "--json"]
    done = subprocess.run(
        [sys.executable, __file__, *words, "--threads", threads, "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: list[Any] = json.loads(done.stdout)
    return found


def _complain(line: str) -> int:
    print(f"bench_inference: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
