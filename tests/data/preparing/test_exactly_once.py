"""Exactly-once: the spans of an epoch, each once, at any number of ranks, with a restart at another in the middle."""

from collections import Counter

import numpy as np
import pytest

from dsbert.data.shards import TokenStore
from dsbert.data.spans import SpanIndex
from dsbert.data.stream import SampleStream
from dsbert.data.tokenizer import Vocabulary

S, GLOBAL_BATCH = 32, 12


@pytest.fixture(scope="module")
def store() -> TokenStore:
    """Every token is its own id, so that a row says which span it is."""
    rng = np.random.default_rng(0)
    ids = iter(range(10, 10**6))
    lengths = [[int(n) for n in rng.integers(1, 40, rng.integers(1, 12))] for _ in range(40)]
    return TokenStore.from_documents([[[next(ids) for _ in range(n)] for n in document] for document in lengths])


class Job:
    """What the training loop does: a step's global batch cut over the ranks, each with a stream of its own."""

    def __init__(self, store: TokenStore, world: int, nsp: bool, window: int) -> None:
        size = store.num_tokens + 100
        vocab = Vocabulary(size, pad=0, unk=1, cls=2, sep=3, mask=4, word_start=np.ones(size, dtype=bool))
        index = SpanIndex.build(store, S)
        options: dict = {"vocab": vocab, "seq_len": S, "seed": 5, "nsp": nsp, "window": window}
        self.streams = [SampleStream(store, index, **options) for _ in range(world)]
        self.spans = dict(zip((index.start + 10).tolist(), range(len(index)), strict=True))

    def step(self, step: int) -> list[int]:
        """The spans that the ranks are given, by the first token of each row, which NSP does not replace."""
        share = -(-GLOBAL_BATCH // len(self.streams))
        found = []
        for rank, stream in enumerate(self.streams):
            first = min(rank * share, GLOBAL_BATCH)
            count = min(share, GLOBAL_BATCH - first)
            batch = stream.batch(step * GLOBAL_BATCH + first, count)
            ids = batch.input_ids.copy()
            ids.reshape(-1)[batch.mlm_positions] = batch.mlm_labels
            found += [self.spans[int(token)] for token in ids[:, 1]]
        return found


@pytest.mark.parametrize("nsp", [True, False])
@pytest.mark.parametrize("window", [0, 64])
def test_an_epoch_at_any_world_size_with_a_restart_at_another(store, nsp, window):
    N = len(SpanIndex.build(store, S))
    steps = -(-2 * N // GLOBAL_BATCH)
    orders = []
    for worlds in ((1, 1), (2, 2), (3, 3), (5, 5), (2, 5), (3, 1)):
        before, after = (Job(store, world, nsp, window) for world in worlds)
        seen = [span for step in range(steps // 3) for span in before.step(step)]
        seen += [span for step in range(steps // 3, steps) for span in after.step(step)]
        for epoch in range(2):
            assert Counter(seen[epoch * N : (epoch + 1) * N]) == Counter(range(N))
        orders.append(seen)
    assert all(order == orders[0] for order in orders)


@pytest.mark.parametrize("nsp", [True, False])
def test_masking_over_a_million_tokens(nsp):
    """Each share with the value that the rule gives, within four standard errors over sequences."""
    rng = np.random.default_rng(1)
    V, continuation, S = 2000, 1200, 128
    documents = []
    for _ in range(1500):
        sentences = []
        for length in rng.integers(5, 45, rng.integers(8, 60)):
            ids = np.where(
                rng.random(length) < 0.3, rng.integers(continuation, V, length), rng.integers(5, continuation, length)
            )
            ids[0] = rng.integers(5, continuation)
            sentences.append(ids.tolist())
        documents.append(sentences)
    store = TokenStore.from_documents(documents)
    vocab = Vocabulary(V, pad=0, unk=1, cls=2, sep=3, mask=4, word_start=np.arange(V) < continuation)
    index = SpanIndex.build(store, S)
    stream = SampleStream(store, index, vocab=vocab, seq_len=S, seed=1, nsp=nsp)
    batches = [stream.batch(first, min(512, len(index) - first)) for first in range(0, len(index), 512)]
    special = 3 if nsp else 2
    text = np.concatenate([batch.attention_mask.sum(axis=1) - special for batch in batches])
    assert text.sum() > 1_000_000
    rows = [batch.mlm_positions // S for batch in batches]
    selected = np.concatenate([np.bincount(r, minlength=len(b.input_ids)) for r, b in zip(rows, batches, strict=True)])
    budget = np.maximum(1, np.rint(0.15 * text))
    assert (selected >= 1).all()
    assert (selected <= budget).all()
    # The greedy rule passes over what no longer fits, so that it is short of the budget only where no word of the
    # right length is left: of 100 tokens in words of 1.4 there always is one of a single token.
    assert (selected == budget).mean() > 0.99
    shares = selected / text
    assert abs(shares.mean() - (budget / text).mean()) < 4 * shares.std() / np.sqrt(len(text)) + 1e-4

    def assert_share(of_row: list[np.ndarray], expected: float) -> None:
        """of_row: for each batch, bool [m] over its selected tokens."""
        parts = zip(rows, of_row, batches, strict=True)
        hits = np.concatenate([np.bincount(r, weights=w, minlength=len(b.input_ids)) for r, w, b in parts])
        residual = hits - expected * selected  # of a sequence, whose tokens need not be independent
        assert abs(residual.mean()) < 4 * residual.std() / np.sqrt(len(residual)), (hits.sum(), selected.sum())

    now = [batch.input_ids.reshape(-1)[batch.mlm_positions] for batch in batches]
    kept = [n == batch.mlm_labels for n, batch in zip(now, batches, strict=True)]
    is_mask = [n == vocab.mask for n in now]
    ordinary = V - 5
    assert_share(is_mask, 0.8)
    assert_share(kept, 0.1 + 0.1 / ordinary)
    assert_share([~k & ~m for k, m in zip(kept, is_mask, strict=True)], 0.1 * (1 - 1 / ordinary))
    assert min(int(n[n != vocab.mask].min()) for n in now) >= 5
    for batch in batches[:4]:
        assert_whole_words(batch, vocab)
    if nsp:
        labels = np.concatenate([batch.nsp_labels for batch in batches])
        labels = labels[labels >= 0]
        assert abs(labels.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(labels) / 2)
    else:
        padding = 1 - (text + special).sum() / (len(text) * S)
        assert padding == pytest.approx(1 - (index.length + special).sum() / (len(index) * S))


def assert_whole_words(batch, vocab) -> None:
    ids = batch.input_ids.copy()
    ids.reshape(-1)[batch.mlm_positions] = batch.mlm_labels
    chosen = np.zeros(ids.shape, dtype=bool)
    chosen.reshape(-1)[batch.mlm_positions] = True
    inside = ~vocab.word_start[ids]
    inside[:, 1:] &= ids[:, :-1] > 4  # what follows a special token begins a word
    inside &= batch.attention_mask.astype(bool)
    assert np.array_equal(chosen[:, 1:][inside[:, 1:]], chosen[:, :-1][inside[:, 1:]])
