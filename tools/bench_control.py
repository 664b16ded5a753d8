"""What ranks tell each other in a step, by gloo's ring as before and by exchanges as now: messages, bytes, time.

    python tools/bench_control.py [--ranks 2,8,32,64] [--repeats 20] [--forward-ms 20] [--json]

Ranks are processes of this machine that do nothing else, over loopback. Messages and bytes are what the kernel says of
their connections (TCP_INFO): gloo's notices of who is ready to receive are among them. Of the two messages of a step
the first, counts and flags, is now under way while a rank goes forward; here it sleeps instead, which needs no core.

in a row: messages that wait for each other and that a step waits for. waited ms: median over repeats of the slowest
rank's wait in a step; verdict ms: of the second message alone, and at best. Many ranks take turns on few cores. At
1,024 ranks with a core each it is computed, from what takes how long on two ranks, which have one here, at best: the
processor time of the thread that trains, and ten messages in a row, of 25 us and of what one takes here.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import struct
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from on_ranks import markdown

from dsbert.base.collectives import gather, gather_ahead, sum_of_rows
from dsbert.base.exchange import num_rounds

_COUNTED, _TIMES, _OBJECTIVES = 7, 4, 2
_SEGMENTS_AT, _BYTES_AT = 156, 200  # in Linux's struct tcp_info: data_segs_out, bytes_sent
_MESSAGE_S, _STEP_S, _MANY = 25e-6, 0.1, 1024


def sent() -> tuple[int, int]:
    """(messages, bytes) that this process has sent on all its TCP connections."""
    segments = nbytes = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(name))) as connection:
                found = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:
            continue
        if len(found) >= _BYTES_AT + 8:
            segments += struct.unpack_from("I", found, _SEGMENTS_AT)[0]
            nbytes += struct.unpack_from("Q", found, _BYTES_AT)[0]
    return segments, nbytes


class Before:
    """A step's two all-reduces, as they were."""

    def __init__(self, ranks: int, forward_s: float) -> None:
        self._counts = torch.zeros(_COUNTED + _TIMES * ranks, dtype=torch.int64)
        self._verdict = torch.zeros(ranks + 1 + _OBJECTIVES, dtype=torch.float64)
        self._forward_s = forward_s

    def counts(self) -> None:
        dist.all_reduce(self._counts)

    def verdict(self) -> None:
        dist.all_reduce(self._verdict)

    def step(self) -> float:
        """Seconds that were waited."""
        start = time.perf_counter()
        self.counts()
        middle = time.perf_counter()
        time.sleep(self._forward_s)
        again = time.perf_counter()
        self.verdict()
        return middle - start + time.perf_counter() - again


class Now:
    """A step's two exchanges."""

    def __init__(self, ranks: int, forward_s: float) -> None:
        self._counts = torch.zeros(_COUNTED + _TIMES, dtype=torch.int64)
        self._verdict = torch.zeros(2 + _OBJECTIVES, dtype=torch.float64)
        self._forward_s = forward_s

    def counts(self) -> None:
        gather(self._counts)[:, :_COUNTED].sum(0).tolist()

    def verdict(self) -> None:
        sum_of_rows(gather(self._verdict)[:, 1:])

    def step(self) -> float:
        """Seconds that were waited."""
        start = time.perf_counter()
        heard = gather_ahead(self._counts)
        begun = time.perf_counter()
        time.sleep(self._forward_s)
        again = time.perf_counter()
        heard()[:, :_COUNTED].sum(0).tolist()
        self.verdict()
        return begun - start + time.perf_counter() - again


def rank_main(rank: int, ranks: int, port: int, repeats: int, forward_s: float, results: Any) -> None:
    """One rank; puts what it has found into the queue `results`."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, None, is_master=rank == 0, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    found: dict[str, dict[str, Any]] = {}
    for name, kind in (("ring", Before), ("exchange", Now)):
        step = kind(ranks, forward_s)
        found[name] = {"waited": [], "verdict": []}
        step.step()
        for part in ("counts", "verdict"):
            found[name][f"{part} sent"] = _sent_by(getattr(step, part))
        found[name]["own"] = []
        for _ in range(repeats):
            dist.barrier()
            start = time.thread_time()
            found[name]["waited"].append(step.step())
            found[name]["own"].append(time.thread_time() - start)
        for _ in range(repeats):
            dist.barrier()
            start = time.perf_counter()
            step.verdict()
            found[name]["verdict"].append(time.perf_counter() - start)
    found["message"] = {"waited": [_message(rank) for _ in range(50 * repeats)] if ranks == 2 else []}
    results.put(found)
    results.close()
    results.join_thread()
    dist.barrier()
    os._exit(0)


def _sent_by(collective: Callable[[], None], times: int = 8) -> tuple[float, float]:
    """(messages, bytes) of one call; others' notices of the next one may come early, so that many are looked at."""
    dist.barrier()
    before = sent()
    for _ in range(times):
        collective()
    after = sent()
    return (after[0] - before[0]) / times, (after[1] - before[1]) / times


def _message(rank: int) -> float:
    """Seconds of a message between two ranks, each way at once."""
    group, row = dist.group.WORLD, torch.zeros(2 + _OBJECTIVES, dtype=torch.float64)
    assert group is not None
    into = torch.empty_like(row)
    start = time.perf_counter()
    works = [group.recv([into], 1 - rank, 1), group.send([row], 1 - rank, 1)]
    for work in works:
        work.wait()
    return time.perf_counter() - start


def measure(ranks: int, repeats: int, forward_s: float) -> list[dict[str, Any]]:
    """What all ranks of one group have found."""
    fork = multiprocessing.get_context("fork")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    results = fork.Queue()
    processes = [
        fork.Process(target=rank_main, args=(rank, ranks, port, repeats, forward_s, results)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return found


def row_of(ranks: int, name: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """One line: medians over ranks of what is sent, over repeats of the slowest rank's waits."""
    in_a_row = num_rounds(ranks) if name == "exchange" else 4 * (ranks - 1)
    mine = [rank[name] for rank in found]
    slowest = [max(times) for times in zip(*(rank["waited"] for rank in mine), strict=True)]
    verdict = [max(times) for times in zip(*(rank["verdict"] for rank in mine), strict=True)]
    return {
        "ranks": ranks,
        "by": name,
        "in a row": in_a_row,
        "sent, counts": round(statistics.median(rank["counts sent"][0] for rank in mine), 1),
        "sent, verdict": round(statistics.median(rank["verdict sent"][0] for rank in mine), 1),
        "bytes": round(statistics.median(rank["counts sent"][1] + rank["verdict sent"][1] for rank in mine)),
        "waited ms": round(1e3 * statistics.median(slowest), 3),
        "verdict ms": round(1e3 * statistics.median(verdict), 3),
        "at best": round(1e3 * min(verdict), 3),
    }


def at_many(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a step of 1,024 ranks waits, each on a core of its own: with messages of 25 us, and of what one takes here.
    found: by two ranks."""
    own_s = min(min(rank["exchange"]["own"]) for rank in found)
    rows = []
    for message_s in (_MESSAGE_S, min(min(rank["message"]["waited"]) for rank in found)):
        now = own_s + num_rounds(_MANY) * message_s
        rows.append(
            {
                "ranks": _MANY,
                "a message us": round(1e6 * message_s, 1),
                "processor us": round(1e6 * own_s, 1),
                "ring ms": round(4 * (_MANY - 1) * message_s * 1e3, 1),
                "exchange ms": round(now * 1e3, 3),
                "of a step of 100 ms": f"{now / _STEP_S:.2%}",
            }
        )
    return rows


def main() -> None:
    """Print one line per number of ranks and way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2,8,32,64")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--forward-ms", type=float, default=20.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    many: list[dict[str, Any]] = []
    for ranks in map(int, options.ranks.split(",")):
        found = measure(ranks, options.repeats, options.forward_ms / 1e3)
        if ranks == 2:
            many = at_many(found)
        rows += [row_of(ranks, name, found) for name in ("ring", "exchange")]
    result = {"load": os.getloadavg()[0], "steps": rows, "at 1,024 ranks": many}
    tables = [f"load {result['load']:.1f}", markdown(rows), *([markdown(many)] if many else [])]
    print(json.dumps(result) if options.json else "\n\n".join(tables))


if __name__ == "__main__":
    main()
