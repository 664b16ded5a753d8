"""What every rank says reaches every rank, in log2 N messages, at any N; who is gone or silent is noticed."""

from __future__ import annotations

import math
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

from tests.helpers import GRACE_S, run_distributed, started

GROUPS = (2, 3, 5, 7)


def rows_in_groups() -> dict[str, list[str]]:
    """In groups of 2 to 7 ranks: rows, sums and messages of small collectives. Returns the bits of what all must have
    alike."""
    import numpy as np
    import torch
    import torch.distributed as dist

    from dsbert.base.collectives import all_reduce, gather, gather_ahead, gather_json, sum_of_rows
    from dsbert.cluster import process_group

    world = process_group.init(60)
    random.seed(world.rank)
    messages = 0
    send = dist.ProcessGroup.send

    def counted(*args: Any) -> Any:
        nonlocal messages
        messages += 1
        return send(*args)

    dist.ProcessGroup.send = counted  # type: ignore[assignment]
    bits: dict[str, list[str]] = {}
    for ranks in GROUPS:
        group = dist.new_group(list(range(ranks)))
        if world.rank >= ranks:
            continue
        # Rounding makes the order of a sum of these visible; what is not finite must look the same everywhere, too.
        everybody = torch.randn(ranks, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        everybody[:, 0], everybody[1:, 1] = math.inf, math.nan
        own, expected, backwards = everybody[world.rank], everybody[0].clone(), everybody[-1].clone()
        for r in range(1, ranks):
            expected += everybody[r]
            backwards += everybody[-1 - r]
        assert ranks == 2 or not torch.equal(expected[2:], backwards[2:])
        rounds, before = math.ceil(math.log2(ranks)), messages
        for turn in range(3):
            ahead = gather_ahead(torch.tensor([world.rank, turn]), group)
            time.sleep(random.random() * 0.003)  # so that some are ahead of others, now in this and now in that
            rows = gather(own, group)
            assert torch.equal(rows.nan_to_num(7.0), everybody.nan_to_num(7.0))
            summed = all_reduce(own.clone(), group=group)
            assert np.array_equal(summed.numpy(), expected.numpy(), equal_nan=True)
            assert np.array_equal(sum_of_rows(rows).numpy(), expected.numpy(), equal_nan=True)
            assert ahead().tolist() == ahead().tolist() == [[r, turn] for r in range(ranks)]
        assert messages - before == 9 * rounds, (messages - before, rounds)
        assert all_reduce(torch.tensor([world.rank, -world.rank]), "max", group).tolist() == [ranks - 1, 0]
        assert gather(torch.tensor(world.rank), group).tolist() == list(range(ranks))
        assert gather(torch.zeros(0, 2), group).shape == (ranks, 0, 2)
        assert gather_json({"r": "x" * world.rank}, group) == [{"r": "x" * r} for r in range(ranks)]
        vector = torch.full((1000,), float(world.rank))
        before = messages
        assert all_reduce(vector, group=group)[0] == ranks * (ranks - 1) / 2
        assert messages == before, "what is large goes round the ring"
        bits[str(ranks)] = [summed.numpy().tobytes().hex(), sum_of_rows(rows).numpy().tobytes().hex()]
    return bits


def test_rows_and_sums_are_the_same_on_all_ranks_in_log_n_messages() -> None:
    first, *others = run_distributed(rows_in_groups, GROUPS[-1])
    for rank, found in enumerate(others, start=1):
        assert found == {ranks: bits for ranks, bits in first.items() if int(ranks) > rank}


def lonely(how: str, folder: str) -> str:
    """Rank 2 is lost, or does not come; the others are in a small collective, or have one ahead. What they see."""
    import torch

    from dsbert.base.collectives import gather, gather_ahead
    from dsbert.base.errors import LostPeerError
    from dsbert.cluster import process_group
    from dsbert.cluster.health import Heartbeat

    silent_s = 1.5 if "silent" in how else 30.0
    world = process_group.init(silent_s)
    gather(torch.zeros(1))
    if world.rank == 2:
        if "silent" not in how:
            os._exit(0)
        while len(list(Path(folder).glob("*.seen"))) < 2:
            time.sleep(0.05)
        os._exit(0)
    if "watched" in how:
        process_group.unlimit()
        hangs = threading.Event()
        heartbeat = Heartbeat(Path(folder), world.rank, ["n"] * 3, timeout_s=1.0)
        heartbeat.on_hang = hangs.set
        heartbeat.start()
        rows = gather_ahead(torch.zeros(1)) if "ahead" in how else None
        if rows is None:
            threading.Thread(target=lambda: gather(torch.zeros(1)), daemon=True).start()
        seen = "hangs" if hangs.wait(20) else "does not hang"
        (Path(folder) / f"{world.rank}.seen").touch()
        return seen
    try:
        with process_group.peer_failures(world):
            rows = gather_ahead(torch.zeros(1)) if "ahead" in how else None
            for _ in range(2):  # one of them may have had all that it needs from a rank that then left
                rows() if rows else gather(torch.zeros(1))
            return "nothing"
    except LostPeerError as error:
        return str(error)
    finally:
        (Path(folder) / f"{world.rank}.seen").touch()


def seen_by_the_others(how: str, folder: Path) -> list[str]:
    with started(lonely, 3, {"how": how, "folder": str(folder)}) as ranks:
        deadline = time.monotonic() + 40 + GRACE_S
        while any(rank.exitcode is None for rank in ranks) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert [rank.exitcode for rank in ranks] == [0, 0, 0], [rank.output for rank in ranks]
        return [rank.result.read_text() for rank in ranks[:2]]


def test_who_is_gone_or_silent_is_noticed(tmp_path: Path) -> None:
    for number, how in enumerate(("gone", "gone, ahead", "silent", "silent, ahead")):
        (folder := tmp_path / str(number)).mkdir()
        for seen in seen_by_the_others(how, folder):
            assert "lost a peer" in seen, how


def test_the_watchdog_sees_a_rank_that_waits_for_a_message(tmp_path: Path) -> None:
    """Also before training, when only a wait in a collective is a hang, and when gloo would wait for ever."""
    for number, how in enumerate(("silent, watched", "silent, watched, ahead")):
        (folder := tmp_path / str(number)).mkdir()
        assert seen_by_the_others(how, folder) == ['"hangs"', '"hangs"'], how
