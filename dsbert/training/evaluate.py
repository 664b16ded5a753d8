"""Losses and accuracies on held-out text, with the same seeded masks for everyone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsbert.base.collectives import all_reduce
from dsbert.base.errors import UserError
from dsbert.config.sparsity_keys import named_as_in_recipes
from dsbert.data.stream import Batch, SampleStream
from dsbert.models.spec import Objective

# Masks, order and NSP partners of every evaluation, whatever the seed of the run.
EVAL_SEED = 20_210_813
_BATCH = 32


@dataclass(frozen=True)
class Score:
    """Means over the predictions of an objective (loss in nats); None where there were none."""

    loss: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Evaluation:
    """Over `tokens` masked tokens, and what else the model's objectives ask about; scores: by objective.

    unigram_loss: cross-entropy of the same tokens under their frequency in the training text.
    """

    sequences: int
    tokens: int
    scores: dict[str, Score]
    unigram_loss: float | None = None

    def is_finite(self) -> bool:
        """Whether every loss is."""
        return all(math.isfinite(score.loss or 0.0) for score in self.scores.values())

    def report(self) -> dict[str, int | float | None]:
        """As `dsbert evaluate` shows it."""
        report: dict[str, int | float | None] = {"sequences": self.sequences, "tokens": self.tokens}
        for name, score in self.scores.items():
            report |= {f"{name}_loss": score.loss, f"{name}_accuracy": score.accuracy}
        return report | {"unigram_loss": self.unigram_loss}


def evaluate(
    forward: Callable[[Batch], tuple[Tensor, Tensor]],
    stream: SampleStream,
    sequences: int,
    objectives: tuple[Objective, ...],
    *,
    micro_batch: int = _BATCH,
    rank: int = 0,
    world_size: int = 1,
    unigram_counts: NDArray[np.int64] | None = None,
    progress: Callable[[int, int], None] | None = None,
    stop_agreed: Callable[[], bool] | None = None,
) -> Evaluation | None:
    """Evaluate the first `sequences` samples of `stream`, shared out over the ranks. Collective if world_size > 1.

    forward(batch) -> (summed losses, hits), both [objectives]. Every rank makes the same number of calls.
    stop_agreed: asked before every call, with the same answer on all ranks; True ends the evaluation with None.
    """
    sequences = min(sequences, stream.num_samples)
    num_batches = -(-sequences // micro_batch)
    size = len(objectives)
    sums = torch.zeros(3 * size + 1, dtype=torch.float64)  # losses, hits, counts; surprise at the masked tokens
    unigram = None if unigram_counts is None else _unigram_log_probabilities(unigram_counts)
    for index in range(rank, -(-num_batches // world_size) * world_size, world_size):
        if stop_agreed and stop_agreed():
            return None
        first = min(index * micro_batch, sequences)
        batch = stream.batch(first, min(micro_batch, sequences - first))
        losses, hits = forward(batch)
        sums[: 2 * size] += torch.cat([losses.double(), hits.double()]).cpu()
        sums[2 * size : -1] += torch.tensor([objective.count(batch) for objective in objectives], dtype=torch.float64)
        if unigram is not None:
            sums[-1] -= float(unigram[batch.mlm_labels].sum())
        if progress:
            progress(min(index + world_size, num_batches), num_batches)
    if world_size > 1:
        all_reduce(sums)
    scores = {
        objective.name: Score(loss / count, hits / count) if count else Score(None, None)
        for objective, (loss, hits, count) in zip(objectives, sums[:-1].view(3, size).T.tolist(), strict=True)
    }
    tokens = float(sums[2 * size])  # masked ones: what the first objective asks about
    unigram_loss = float(sums[-1]) / tokens if tokens and unigram is not None else None
    return Evaluation(sequences, int(tokens), scores, unigram_loss)


def evaluate_checkpoint(
    path: Path,
    texts: Sequence[str],
    progress: Callable[[int, int], None] | None = None,
    *,
    documents: Sequence[str] = (),
    text_column: str | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint or the newest one of a run, on its held-out documents or on the documents of `texts`.

    Args:
        path: the checkpoint, or the run.
        texts: SOURCES, as data/sources.py says; none for the held-out documents.
        progress: told (done, total) batches.
        documents: how rows of `texts` make documents, as `data.prepare` takes it.
        text_column: what tables among `texts` call their text; "text" by default.

    Returns what `Evaluation.report` does and step; of `texts` also left_out: files by reason (data/folders.py).

    Raises UserError for missing data or text, CheckpointError for a missing or damaged checkpoint.
    """
    from dsbert.checkpoint.restore import restore_model
    from dsbert.data.manifest import load_unigram_counts
    from dsbert.data.preparing.corpus import TEXT_COLUMN, read_documents
    from dsbert.data.preparing.folders import LeftOut, summarized
    from dsbert.models.device_batch import DeviceBatch
    from dsbert.models.spec import model_spec

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not texts and (documents or text_column):
        raise UserError(
            "expected --documents and --text-column with --text, whose rows they are about; found no --text"
        )
    restored = restore_model(path, device)
    left_out: list[LeftOut] = []
    if texts:
        stream = _text_stream(restored, read_documents(texts, documents, text_column or TEXT_COLUMN, left_out))
    else:
        stream = _held_out_stream(restored)
    restored.model.eval()

    @torch.no_grad()
    def forward(batch: Batch) -> tuple[Tensor, Tensor]:
        with named_as_in_recipes():  # kernels are chosen with the first batch
            found: tuple[Tensor, Tensor] = restored.model(DeviceBatch.of(batch, device))
        return found

    counts = load_unigram_counts(restored.path)
    objectives = model_spec(restored.recipe.model).objectives
    result = evaluate(forward, stream, stream.num_samples, objectives, unigram_counts=counts, progress=progress)
    assert result is not None
    named = {"left_out": summarized(left_out)} if texts else {}
    return {"step": restored.state.step} | result.report() | named


def _held_out_stream(restored: Any) -> SampleStream:
    from dsbert.data.manifest import load_manifest
    from dsbert.data.verification import verify_data

    data, expected = restored.recipe.data, restored.state.identity.data_digest
    manifest = load_manifest(data.path)
    if manifest.digest != expected:
        raise UserError(
            f"expected the data that the run was trained on in {data.path} (digest {expected}), found "
            f"{manifest.digest}: prepare it again as it was, or use --text"
        )
    if not manifest.splits["validation"].documents:
        raise UserError(f"expected held-out documents in {data.path}, found none: use --text")
    suspect = verify_data(data.path, data.seq_len, ["validation"])
    options = (data.nsp, data.mask_fraction)
    return SampleStream.open(data.path, "validation", data.seq_len, EVAL_SEED, *options, suspect=suspect)


def _text_stream(restored: Any, texts: Iterable[list[str]]) -> SampleStream:
    from dsbert.data.manifest import TOKENIZER
    from dsbert.data.preparing.encoding import Encoder
    from dsbert.data.preparing.streaming import store_of
    from dsbert.data.spans import SpanIndex
    from dsbert.data.tokenizer import Vocabulary, load_tokenizer

    tokenizer = load_tokenizer(restored.path / TOKENIZER)
    store = store_of(["\n".join(sentences) for sentences in texts], Encoder(tokenizer))
    data = restored.recipe.data
    index = SpanIndex.build(store, data.seq_len)
    vocab = Vocabulary.of(tokenizer)
    return SampleStream(
        store, index, vocab=vocab, seq_len=data.seq_len, seed=EVAL_SEED, nsp=data.nsp, mask_fraction=data.mask_fraction
    )


def _unigram_log_probabilities(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Add-one smoothed, so that a token that training never showed has a finite loss."""
    smoothed = counts.astype(np.float64) + 1.0
    log_probabilities: NDArray[np.float64] = np.log(smoothed / smoothed.sum())
    return log_probabilities
