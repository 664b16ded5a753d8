"""What the ranks of a run have to do in a step: samples, tokens, predictions, and who is left without.

Lengths are those of the data where it is there, as samples are never padded to the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsbert.base.errors import DsbertError
from dsbert.config.recipe import Recipe
from dsbert.data.manifest import load_manifest
from dsbert.data.shards import TokenStore
from dsbert.data.spans import NUM_SPECIAL, SpanIndex, span_index_name
from dsbert.engine.micro_batches import cut
from dsbert.jobs.capacity.figures import Kind

# Of samples of sentences, packed (docs/benchmarks.md: 77 and 79 %), where there is no data to look at.
_USUAL_FILL = 0.78
_USUAL_VOCABULARY = 30522
# More tokens take longer than a plan should to be cut into samples, unless a start has done that before.
_MOST_TOKENS = 50_000_000
_SPREAD = 1024


def most_flops(recipe: Recipe) -> int:
    """Of a whole training if its samples filled all positions of seq_len, as the paper counts them."""
    from dsbert.models.construction import recipe_flops  # transformers, which other commands do without

    return recipe_flops(recipe) * recipe.batch.global_batch * recipe.optim.total_steps


@dataclass(frozen=True, eq=False)
class Samples:
    """lengths: int64, ascending, in tokens with the special ones: as they are spread over all samples, or one for all.
    count: samples of an epoch, None where not known. kind, how: of lengths and vocabulary."""

    lengths: NDArray[np.int64]
    count: int | None
    vocab_size: int
    kind: Kind
    how: str

    @property
    def mean(self) -> float:
        """Tokens of a sample."""
        return float(self.lengths.mean())

    def typical(self, count: int) -> NDArray[np.int64]:
        """`count` lengths that are spread as all are: int64 [count]."""
        places = (np.arange(count) + 0.5) / count * len(self.lengths)
        return self.lengths[places.astype(np.int64)]


def read_samples(recipe: Recipe, vocab_size: int | None = None) -> Samples:
    """Of the recipe's training text. vocab_size: where it is to be another one than the data's, or there is no data."""
    path, seq_len = recipe.data.path, recipe.data.seq_len
    try:
        manifest = load_manifest(path)
        split = manifest.splits["train"]
        vocabulary = vocab_size or manifest.tokenizer.vocab_size
        if split.tokens > _MOST_TOKENS and not (path / span_index_name("train", seq_len)).is_dir():
            count = round(split.tokens / (_USUAL_FILL * seq_len))
            how = f"{split.tokens:,} tokens, not cut into samples yet: as full as is usual, {_USUAL_FILL:.0%}"
            return Samples(_usual(seq_len), count, vocabulary, "estimated", how)
        return _from_index(path, recipe, vocabulary)
    except DsbertError:
        how = f"no data that can be read: samples as full as is usual, {_USUAL_FILL:.0%}"
        return Samples(_usual(seq_len), None, vocab_size or _USUAL_VOCABULARY, "estimated", how)


def _from_index(path: Path, recipe: Recipe, vocab_size: int) -> Samples:
    seq_len = recipe.data.seq_len
    index = SpanIndex.open(path, "train", seq_len, TokenStore.open(path, "train"))
    special = NUM_SPECIAL if recipe.data.nsp else NUM_SPECIAL - 1
    lengths = np.sort(np.asarray(index.length, dtype=np.int64)) + special
    places = np.linspace(0, len(lengths) - 1, min(_SPREAD, len(lengths))).astype(np.int64)
    return Samples(lengths[places], len(index), vocab_size, "measured", f"the samples in {path}")


def _usual(seq_len: int) -> NDArray[np.int64]:
    return np.array([max(NUM_SPECIAL + 2, round(_USUAL_FILL * seq_len))], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Workload:
    """A step on `ranks` ranks. micro_batch: samples of one, at most. accumulation_steps: micro-batches of a rank, at
    most. without_samples: of all (rank, micro-batch) pairs of a step, how many have none. most_samples: of the rank
    that has most, in a step."""

    ranks: int
    global_batch: int
    micro_batch: int
    accumulation_steps: int
    without_samples: int
    most_samples: int
    samples: Samples
    mask_fraction: float

    @classmethod
    def of(cls, recipe: Recipe, ranks: int, samples: Samples, micro_batch: int | None = None) -> Workload:
        """As `TrainEngine.plan` cuts it. Raises UserError for more ranks than samples."""
        batch = recipe.batch
        if micro_batch:
            batch = batch.model_copy(update={"micro_batch": micro_batch})
        batch = batch.on_ranks(ranks)
        accumulation = -(-batch.global_batch // (batch.micro_batch * ranks))
        shares = [cut(batch, rank, ranks) for rank in range(ranks)]
        filled = sum(len(share) for share in shares)
        most = max(sum(micro.count for micro in share) for share in shares)
        return cls(
            ranks, batch.global_batch, batch.micro_batch, accumulation, ranks * accumulation - filled, most, samples,
            recipe.data.mask_fraction,
        )  # fmt: skip

    @property
    def room(self) -> int:
        """Samples that the micro-batches of a step could hold."""
        return self.ranks * self.accumulation_steps * self.micro_batch

    @property
    def tokens(self) -> float:
        """Of the global batch."""
        return self.global_batch * self.samples.mean

    def micro_lengths(self) -> NDArray[np.int64]:
        """Of a full micro-batch: int64 [micro_batch]."""
        return self.samples.typical(self.micro_batch)

    def fullest_lengths(self) -> NDArray[np.int64]:
        """Of the fullest micro-batch of a long run, four standard deviations above the usual one: int64
        [micro_batch]."""
        usual = self.micro_lengths()
        spread = float(self.samples.lengths.std()) * math.sqrt(self.micro_batch)
        stretched: NDArray[np.int64] = np.ceil(usual * (1 + 4 * spread / float(usual.sum()))).astype(np.int64)
        return np.minimum(stretched, int(self.samples.lengths.max()))

    def predictions(self, lengths: NDArray[np.int64]) -> int:
        """Masked tokens of samples of these lengths, int64 [n]."""
        text = np.maximum(lengths - NUM_SPECIAL, 1)
        return int(np.maximum(np.round(self.mask_fraction * text), 1).sum())
