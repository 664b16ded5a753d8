import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsbert.data.hashing import hash64
from dsbert.data.masking import mask_words_
from dsbert.data.tokenizer import Vocabulary

V = 200
FIRST_CONTINUATION = 120
CLS, SEP, MASK = 2, 3, 4
VOCAB = Vocabulary(V, pad=0, unk=1, cls=CLS, sep=SEP, mask=MASK, word_start=np.arange(V) < FIRST_CONTINUATION)


def make_rows(rows: int, S: int, seed: int = 0, continuation: float = 0.4):
    """Rows [CLS] text [SEP] padding of random lengths, with random words."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((rows, S), dtype=np.int64)
    maskable = np.zeros((rows, S), dtype=bool)
    for row in range(rows):
        length = rng.integers(1, S - 1)
        words = rng.integers(5, FIRST_CONTINUATION, length)
        inside = rng.integers(FIRST_CONTINUATION, V, length)
        ids[row, 0], ids[row, length + 1] = CLS, SEP
        ids[row, 1 : length + 1] = np.where(rng.random(length) < continuation, inside, words)
        maskable[row, 1 : length + 1] = True
    return ids, maskable


def run(ids, maskable, fraction=0.15, seed=0):
    changed = ids.copy()
    keys = hash64([seed], np.arange(len(ids)))
    masked = mask_words_(changed, maskable, keys, VOCAB, VOCAB.ordinary_ids, fraction)
    return changed, masked


def words_of(ids, maskable, row):
    """The words of one row as lists of columns, by the definition."""
    words: list[list[int]] = []
    for column in np.flatnonzero(maskable[row]).tolist():
        if ids[row, column] < FIRST_CONTINUATION or not maskable[row, column - 1]:
            words.append([column])
        else:
            words[-1].append(column)
    return words


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    S=st.integers(4, 60),
    fraction=st.floats(0.01, 1.0),
    continuation=st.sampled_from([0, 0.4, 0.95, 1]),
)
def test_whole_words_within_the_budget(seed, S, fraction, continuation):
    ids, maskable = make_rows(6, S, seed, continuation)
    changed, (positions, labels) = run(ids, maskable, fraction, seed)
    assert np.array_equal(positions, np.unique(positions))
    assert np.array_equal(labels, ids.reshape(-1)[positions])
    assert maskable.reshape(-1)[positions].all()
    untouched = np.ones(ids.size, dtype=bool)
    untouched[positions] = False
    assert np.array_equal(changed.reshape(-1)[untouched], ids.reshape(-1)[untouched])
    for row in range(len(ids)):
        budget = max(1, round(fraction * int(maskable[row].sum())))
        chosen = set((positions[positions // S == row] % S).tolist())
        words = words_of(ids, maskable, row)
        assert 1 <= len(chosen) <= budget
        if min(map(len, words)) > budget:
            assert any(chosen == set(word[:budget]) for word in words)
            continue
        assert all(chosen >= set(word) or not chosen & set(word) for word in words)
        # Greedy: no word that was passed over would still fit.
        assert all(len(word) > budget - len(chosen) for word in words if not chosen & set(word))


def test_a_row_without_text_is_left_alone():
    ids, maskable = make_rows(3, 16)
    maskable[1] = False
    _, (positions, _) = run(ids, maskable)
    assert set((positions // 16).tolist()) == {0, 2}
    _, (positions, _) = run(ids, np.zeros_like(maskable))
    assert positions.size == 0


def test_statistics():
    """Each within four standard errors; rows of single-token words of 100 tokens, so that the budget is exact."""
    rows, S = 4000, 102
    rng = np.random.default_rng(1)
    ids = rng.integers(5, FIRST_CONTINUATION, (rows, S))
    ids[:, 0], ids[:, -1] = CLS, SEP
    maskable = np.ones((rows, S), dtype=bool)
    maskable[:, [0, -1]] = False
    changed, (positions, labels) = run(ids, maskable)
    m = len(positions)
    assert m == rows * 15
    now = changed.reshape(-1)[positions]

    def assert_share(share: float, expected: float) -> None:
        assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / m)

    ordinary = V - 5
    assert_share((now == MASK).mean(), 0.8)
    assert_share((now == labels).mean(), 0.1 + 0.1 / ordinary)
    replaced = now[(now != MASK) & (now != labels)]
    assert_share(len(replaced) / m, 0.1 * (1 - 1 / ordinary))
    assert replaced.min() >= 5
    # Replacements are drawn evenly from all ordinary ids, continuations included.
    counts = np.bincount(replaced, minlength=V)[5:]
    mean = len(replaced) / ordinary
    assert ((counts - mean) ** 2 / mean).sum() < ordinary + 4 * np.sqrt(2 * ordinary)
    # Every column is chosen equally often.
    columns = np.bincount(positions % S, minlength=S)[1:-1]
    assert np.abs(columns - rows * 0.15).max() < 5 * np.sqrt(rows * 0.15 * 0.85)


def test_the_kind_is_drawn_for_each_token_and_not_for_each_word():
    ids, maskable = make_rows(500, 60, continuation=0.8)
    changed, (positions, _) = run(ids, maskable)
    neighbours = np.flatnonzero(np.diff(positions) == 1)
    is_mask = changed.reshape(-1)[positions] == MASK
    assert (is_mask[neighbours] != is_mask[neighbours + 1]).mean() > 0.2  # 2 * 0.8 * 0.2 if independent


def test_choices_follow_the_key():
    ids, maskable = make_rows(50, 60)
    same, other = run(ids, maskable), run(ids, maskable, seed=1)
    assert np.array_equal(run(ids, maskable)[0], same[0])
    assert not np.array_equal(other[0], same[0])


# positions, labels, row after masking
GOLDEN = ([1, 2, 8, 9], [10, 130, 15, 16], [CLS, MASK, MASK, 11, 12, 13, 14, 131, MASK, MASK, SEP, 0])


def test_golden():
    ids = np.array([[CLS, 10, 130, 11, 12, 13, 14, 131, 15, 16, SEP, 0]])
    maskable = np.array([[False] + [True] * 9 + [False] * 2])
    changed, (positions, labels) = run(ids, maskable, fraction=0.5)
    assert (positions.tolist(), labels.tolist(), changed[0].tolist()) == GOLDEN


@pytest.mark.parametrize("S", [12, 300])
def test_rows_do_not_depend_on_their_neighbours(S):
    ids, maskable = make_rows(8, S)
    keys = hash64([3], np.arange(8))
    together = ids.copy()
    mask_words_(together, maskable, keys, VOCAB, VOCAB.ordinary_ids, 0.15)
    for row in range(8):
        alone = ids[row : row + 1].copy()
        mask_words_(alone, maskable[row : row + 1], keys[row : row + 1], VOCAB, VOCAB.ordinary_ids, 0.15)
        assert np.array_equal(alone[0], together[row])
