"""What is in prepared data: counts, lengths, and samples as text, with what a model is asked about them."""

from __future__ import annotations

from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsbert.data.manifest import SPLITS, TOKENIZER, load_manifest
from dsbert.data.preparing.folders import left_out_lines
from dsbert.data.preparing.learning import unknown_fraction
from dsbert.data.shards import TokenStore
from dsbert.data.spans import NUM_SPECIAL, SpanIndex
from dsbert.data.stream import SampleStream
from dsbert.data.tokenizer import load_tokenizer, vocabulary_of
from dsbert.data.verification import verify_data

_QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)
_CONTINUATION = "##"


def inspect_data(path: Path, seq_len: int = 128, examples: int = 3, seed: int = 1, nsp: bool = True) -> dict[str, Any]:
    """Describe a prepared data directory.

    Returns:
        sources, tokenizer, dropped, mended, mended_in, left_out and digest as in the manifest; unknown: the fraction of
        [UNK] among the training tokens; splits: of each, documents, sentences, tokens, shards, bytes, quantiles (0, 10,
        50, 90, 100 %) of document_tokens and sentence_tokens, and of its spans of `seq_len`: number, dropped_tokens,
        padding (the fraction of positions that they leave empty); examples: the first samples of epoch 0 in the train
        split as {text, nsp}, where [token->seen] is one that is asked for, and what stands there instead.

    Raises:
        UserError, DataError: no prepared data, or damaged.
    """
    manifest = load_manifest(path)
    suspect = verify_data(path, seq_len)
    stream = SampleStream.open(path, "train", seq_len, seed, nsp, suspect=suspect)
    splits = {
        split: _describe(path, split, seq_len, nsp, suspect) for split in SPLITS if manifest.splits[split].documents
    }
    return {
        "path": str(path),
        "digest": manifest.digest,
        "sources": [vars(source) for source in manifest.request.sources],
        "tokenizer": vars(manifest.tokenizer),
        "dropped": manifest.dropped,
        "mended": manifest.mended,
        "mended_in": list(manifest.mended_in),
        "left_out": manifest.left_out,
        "unknown": unknown_fraction(path),
        "seq_len": seq_len,
        "splits": splits,
        "examples": _examples(stream, vocabulary_of(load_tokenizer(path / TOKENIZER)), examples),
    }


def _describe(path: Path, split: str, seq_len: int, nsp: bool, suspect: Container[str]) -> dict[str, Any]:
    store = TokenStore.open(path, split)
    spans = SpanIndex.open(path, split, seq_len, store, suspect)
    special = NUM_SPECIAL if nsp else NUM_SPECIAL - 1
    return {
        "documents": store.num_documents,
        "sentences": store.num_sentences,
        "tokens": store.num_tokens,
        "shards": len(store.shards),
        "bytes": sum(entry.bytes for entry in load_manifest(path).splits[split].shards),
        "document_tokens": _quantiles([np.diff(shard.document_offsets) for shard in store.shards]),
        "sentence_tokens": _quantiles([shard.sentence_lengths for shard in store.shards]),
        "spans": len(spans),
        "dropped_tokens": spans.dropped_tokens,
        "padding": 1 - float((spans.length.astype(np.int64) + special).sum()) / max(1, len(spans) * seq_len),
    }


def _quantiles(parts: list[NDArray[Any]]) -> list[int]:
    values = np.concatenate(parts)
    return [int(value) for value in np.quantile(values, _QUANTILES, method="nearest")]


def _examples(stream: SampleStream, tokens: list[str], count: int) -> list[dict[str, Any]]:
    count = min(count, stream.num_samples)
    batch = stream.batch(0, count)
    asked = dict(zip(batch.mlm_positions.tolist(), batch.mlm_labels.tolist(), strict=True))
    found = []
    for row in range(count):
        words: list[str] = []
        for column in range(int(batch.attention_mask[row].sum())):
            token = seen = tokens[int(batch.input_ids[row, column])]
            original = asked.get(row * stream.seq_len + column)
            if original is not None:
                token = tokens[original]
                shown = f"[{token.removeprefix(_CONTINUATION)}->{seen}]"
            else:
                shown = token.removeprefix(_CONTINUATION)
            if token.startswith(_CONTINUATION) and words:
                words[-1] += shown
            else:
                words.append(shown)
        label = int(batch.nsp_labels[row])
        found.append({"text": " ".join(words), "nsp": {0: "B follows A", 1: "B is other text"}.get(label)})
    return found


def report_lines(report: dict[str, Any]) -> Iterable[str]:
    """What `inspect_data` returned, for people."""
    tokenizer = report["tokenizer"]
    case = "lower case" if tokenizer["lowercase"] else "cased"
    unknown = f"{report['unknown']:.2%} of the tokens are [UNK]"
    yield f"{report['path']}: digest {report['digest']}"
    for source in report["sources"]:
        yield f"  source       {source['name']} ({source['documents']}; {source['fingerprint']})"
    yield f"  tokenizer    {tokenizer['vocab_size']:,} tokens, {case}, {unknown}, {tokenizer['digest']}"
    yield "  dropped      " + ", ".join(f"{number:,} {cause}" for cause, number in report["dropped"].items())
    if report["mended"]:
        yield f"  mended       {report['mended']:,} documents, e.g. {'; '.join(report['mended_in'])}"
    for line in left_out_lines(report["left_out"]):
        yield f"  left out     {line}"
    for name, split in report["splits"].items():
        yield (
            f"  {name:<12} {split['documents']:,} documents, {split['sentences']:,} sentences, "
            f"{split['tokens']:,} tokens, {split['bytes']:,} bytes in {split['shards']} shards"
        )
        for what in ("document", "sentence"):
            shown = " ".join(f"{value:,}" for value in split[f"{what}_tokens"])
            yield f"    tokens of a {what}, least, 10 %, half, 90 %, most: {shown}"
        yield (
            f"    at {report['seq_len']} tokens: {split['spans']:,} samples, which fill {1 - split['padding']:.1%} of "
            "their positions (the rest is padding, and not computed); "
            f"{split['dropped_tokens']:,} tokens alone in a document's end left out"
        )
    for example in report["examples"]:
        yield f"  [{example['nsp'] or 'no NSP'}] {example['text']}"
