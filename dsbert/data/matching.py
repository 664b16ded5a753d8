"""Matching: which spans have Bs that may stand for each other.

First spans whose Bs are equal, by their own cuts, become PARTNERS: most of a large corpus. The others go on in rounds:
cuts of all that are left are sorted so that those that are alike stand together, each is compared with the next few,
and spans whose Bs are nearest to each other become partners, cut there. Later rounds try more cuts of a span, and
compare more. Who finds nobody near enough has no partner.

All is integers and hashes: the same on every machine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsbert.data.hashing import PAIRS, SIDES, UInt64s, below, hash64
from dsbert.data.profiles import LENGTH_BITS, OUTSIDE_BITS, UNIT, Cuts

Int64s = NDArray[np.int64]

# (cuts at most so far from the span's own, how many neighbours are compared, how far apart profiles may be)
_ROUNDS = (
    (0, 4, UNIT // 2),
    (1, 6, UNIT // 2),
    (3, 8, UNIT // 2),
    (3, 8, UNIT * 3 // 4),
    (8, 8, UNIT * 3 // 4),
    (8, 16, UNIT * 3 // 4),
    (8, 16, UNIT * 3 // 4),
)
_WEIGHT = 15  # odd weights of kinds of punctuation, that of a round from -15 to 15
_SCATTER = 0x9E3779B1  # odd: multiplied by it, numbers of some bits are those numbers in another order
_PASSES = 12  # over the neighbours of a round: those that are left have other rounds


def matched(cuts: Cuts, document: Int64s, first: int) -> tuple[Int64s, Int64s, NDArray[np.bool_]]:
    """The partners of spans and where they are cut, both int64 [n], itself and 0 for who has none; and the side that
    each is on, bool [n]: that of its partner.

    Args:
        cuts: of n consecutive spans.
        document: of these spans.
        first: the number of the first of them.
    """
    partner, a_length = np.arange(first, first + len(document)), np.zeros(len(document), dtype=np.int64)
    outside = np.zeros(len(document), dtype=np.uint64)
    free = np.ones(len(document), dtype=np.bool_)

    def join(of: Cuts, u: Int64s, v: Int64s) -> None:
        for one, other in ((u, v), (v, u)):
            mine = of.span[one] - first
            partner[mine], a_length[mine], free[mine] = of.span[other], of.a_length[one], False
            outside[mine] = of.outside[one]

    own = np.flatnonzero((cuts.distance == 0) & cuts.fits)
    join(cuts, *_equal(cuts, own, document[cuts.span[own] - first]))
    cuts = cuts.only(np.flatnonzero(free[cuts.span - first] & cuts.fits))
    profile, span = cuts.profile(), cuts.span - first
    for number, (distance, neighbours, apart) in enumerate(_ROUNDS):
        tried = np.flatnonzero((cuts.distance <= distance) & free[span])
        if tried.size < 2:
            continue
        tried = tried[_order(cuts.outside[tried], profile[:, tried], number)]
        at, step, rank = _near(cuts.outside[tried], profile[:, tried], document[span[tried]], neighbours, apart)
        join(cuts, *_mutual(tried[at], tried[at + step], rank, span, len(document)))
    return partner, a_length, _sides(partner - first, a_length, outside, first)


def _sides(partner: Int64s, a_length: Int64s, outside: UInt64s, first: int) -> NDArray[np.bool_]:
    """Drawn, but for partners that look alike from outside, two by two: the one and the other side.

    So when one side exchanges Bs, half of what has a length and edges of one kind does, and not half of it by chance.
    """
    lower = np.flatnonzero(partner > np.arange(len(partner)))
    together = (a_length[lower] + a_length[partner[lower]]).astype(np.uint64)
    bits = len(lower).bit_length()
    packed = ((outside[lower] << np.uint64(LENGTH_BITS + 1)) | together) << np.uint64(bits)
    packed |= np.arange(len(lower), dtype=np.uint64)
    packed.sort()
    order = lower[(packed & np.uint64((1 << bits) - 1)).astype(np.int64)]
    heads = np.repeat(order[::2] + first, 2)[: len(order)]
    sides = np.zeros(len(partner), dtype=np.bool_)
    sides[order] = (hash64([SIDES], heads) >> np.uint64(63)) ^ np.arange(len(order), dtype=np.uint64) & np.uint64(1)
    sides[partner[lower]] = sides[lower]
    return sides


def _equal(cuts: Cuts, own: Int64s, document: Int64s) -> tuple[Int64s, Int64s]:
    """Those of the cuts `own`, of spans of these documents, that give equal Bs: two by two, in a drawn order."""
    bits = max(1, len(own).bit_length())
    mask = np.uint64((1 << bits) - 1)
    counted = hash64([PAIRS], *cuts.counts[:, own]) >> np.uint64(OUTSIDE_BITS + bits)
    packed = (cuts.outside[own] << np.uint64(64 - OUTSIDE_BITS)) | (counted << np.uint64(bits))
    packed |= np.arange(len(own), dtype=np.uint64) * np.uint64(_SCATTER) & mask  # neighbours in a document part
    packed.sort()
    alike = packed >> np.uint64(bits)
    order = ((packed & mask) * np.uint64(pow(_SCATTER, -1, 1 << bits)) & mask).astype(np.int64)
    numbers = np.arange(len(own))
    begins = np.ones(len(own), dtype=np.bool_)
    begins[1:] = alike[1:] != alike[:-1]
    even = (numbers - np.maximum.accumulate(np.where(begins, numbers, 0))) % 2 == 0
    at = np.flatnonzero(even[:-1] & ~begins[1:])
    u, v = order[at], order[at + 1]
    # Few of those whose hashes are equal are not.
    equal = (document[u] != document[v]) & (cuts.counts[:, own[u]] == cuts.counts[:, own[v]]).all(axis=0)
    return own[u[equal]], own[v[equal]]


def _order(outside: UInt64s, profile: NDArray[np.int16], number: int) -> Int64s:
    """Sorts by outside, and among equals along another line through the profiles in each round."""
    weights = 2 * below(hash64([PAIRS, number], np.arange(len(profile))), _WEIGHT + 1) - _WEIGHT
    along = np.zeros(len(outside), dtype=np.int64)
    for of_kind, weight in zip(profile, weights.tolist(), strict=True):
        along += of_kind.astype(np.int64) * weight
    along -= along.min()
    bits = len(outside).bit_length()
    along >>= max(0, int(along.max()).bit_length() - (64 - OUTSIDE_BITS - bits))
    packed = (outside << np.uint64(64 - OUTSIDE_BITS)) | (along.astype(np.uint64) << np.uint64(bits))
    packed |= np.arange(len(outside), dtype=np.uint64)
    packed.sort()
    order: Int64s = (packed & np.uint64((1 << bits) - 1)).astype(np.int64)
    return order


def _near(
    outside: UInt64s, profile: NDArray[np.int16], document: Int64s, neighbours: int, apart: int
) -> tuple[Int64s, Int64s, UInt64s]:
    """Which of the sorted cuts may be partners': the first's place, how many on the other's is, and their rank.

    The rank is how far apart they are, with a number drawn for those that are equally far.
    """
    found: list[tuple[Int64s, Int64s, Int64s]] = []
    for step in range(1, min(neighbours, len(outside) - 1) + 1):
        distance = np.zeros(len(outside) - step, dtype=np.int32)
        for of_kind in profile:
            distance += np.abs(of_kind[step:] - of_kind[:-step])
        good = (distance <= apart) & (outside[step:] == outside[:-step]) & (document[step:] != document[:-step])
        at = np.flatnonzero(good)
        found.append((at, np.full_like(at, step), distance[at].astype(np.int64)))
    at, steps, distances = (np.concatenate(column) for column in zip(*found, strict=True))
    return at, steps, distances.astype(np.uint64) << np.uint64(32) | hash64([PAIRS], at, steps) >> np.uint64(32)


def _mutual(u: Int64s, v: Int64s, rank: UInt64s, span: Int64s, spans: int) -> tuple[Int64s, Int64s]:
    """Those of the cuts u and v that are nearest to each other of all that both their spans have left."""
    order = np.argsort(rank, kind="stable")
    u, v = u[order], v[order]
    taken = np.zeros(spans, dtype=np.bool_)
    nearest = np.empty(spans, dtype=np.int64)
    chosen: list[tuple[Int64s, Int64s]] = [(u[:0], v[:0])]
    for _ in range(_PASSES):
        if not u.size:
            break
        numbers, of_u, of_v = np.arange(len(u)), span[u], span[v]
        nearest[of_u] = nearest[of_v] = len(u)
        np.minimum.at(nearest, of_u, numbers)
        np.minimum.at(nearest, of_v, numbers)
        mutual = (nearest[of_u] == numbers) & (nearest[of_v] == numbers)
        chosen.append((u[mutual], v[mutual]))
        taken[of_u[mutual]] = taken[of_v[mutual]] = True
        left = ~(taken[of_u] | taken[of_v])
        u, v = u[left], v[left]
    return np.concatenate([pair[0] for pair in chosen]), np.concatenate([pair[1] for pair in chosen])
