"""What the start of a rank does as ranks become more."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tests.helpers import run_distributed


def meeting() -> dict[str, int]:
    """What this rank reads to connect to all others, and how many files it may have open then."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    from dsbert.base.collectives import gather_json
    from dsbert.cluster import process_group
    from dsbert.cluster.sealed_store import SealedStore

    read: Counter[str] = Counter()
    get, multi_get = SealedStore.get, SealedStore.multi_get

    def counted_get(store: SealedStore, key: str) -> bytes:
        read["asked"] += "cpu" in key  # gloo's
        return get(store, key)

    def counted_multi_get(store: SealedStore, keys: list[str]) -> list[bytes]:
        found = multi_get(store, keys)
        read["asked"] += 1
        read["bytes"] += sum(map(len, found))
        return found

    patched: Any = SealedStore
    patched.get, patched.multi_get = counted_get, counted_multi_get
    world = process_group.init(60)
    assert gather_json(world.rank) == list(range(world.world_size))
    return {**read, "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0], "hard": hard}


def test_what_a_rank_reads_of_all_addresses_grows_with_their_number_alone() -> None:
    few, many = (run_distributed(meeting, ranks) for ranks in (2, 6))
    assert {one["asked"] for one in (*few, *many)} == {1}
    # As long on six ranks as on two: with an address for every other rank in each, it would not be.
    assert {one["bytes"] for one in many} == {3 * one["bytes"] for one in few}
    assert all(one["files"] >= min(1024, one["hard"]) for one in many)
