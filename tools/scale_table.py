"""What a rank does at 2 to 1,024 ranks: seconds, messages, bytes and files, part by part of a run.

    python tools/scale_table.py [--ranks 2,8,32,64,256,1024] [--processes 2,8,32] [--json]

how: `processes`: as many real ones as ranks, over loopback, the slowest one's time; `simulated`: dsbert's code, for one
rank of so many with as many real files, or for all of them as threads that pass messages in memory; `computed`: from
what was counted with processes, at 1.25e9 bytes a second between nodes, and shown beside those. Messages, bytes and
files are what one rank sends, or reads and writes; of rank 0 where it has more to do. Processes that meet ask again
while they wait, and gloo's notices are among the messages that their kernel counts (three to one of ours).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_control import sent
from on_ranks import markdown
from thread_ranks import ThreadGroup, Wires

from dsbert.base.exchange import exchange_rows, num_rounds
from dsbert.checkpoint.fragments import FragmentBuffer, FragmentReader, fragments_name
from dsbert.checkpoint.loading import TOPOLOGY, step_name, verify_checkpoint
from dsbert.checkpoint.publisher import Publisher, Retention
from dsbert.checkpoint.state import FORMAT, KIND, STATE, FileRecord, Manifest
from dsbert.cluster.heartbeats import Beat, beats_in
from dsbert.cluster.stragglers import WINDOW_STEPS, StragglerWatch
from dsbert.engine.zero_shards import ParamShard

_ADDRESS_BYTES = 154  # of a rank's gloo, sealed
_SHARD_NUMEL = 4096
_STEP_NUMBERS = 11  # int64 that a rank tells of a step with two objectives
_LARGE_BLOCKS = 30_198_988  # of BERT-Large at density 0.1 and block 1
_UPDATE_S_A_BLOCK, _NETWORK_BYTES_PER_S = 165e-9, 1.25e9


def row(
    part: str, ranks: int, how: str, seconds: float | None, messages: float = 0, nbytes: float = 0, files: int = 0
) -> dict[str, Any]:
    """A line of the table."""
    return {
        "part": part, "ranks": ranks, "how": how, "seconds": seconds, "messages": round(messages),
        "bytes": round(nbytes), "files": files,
    }  # fmt: skip


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# Processes


def rank_main(rank: int, ranks: int, port: int, results: Any) -> None:
    """One real rank: meets the others as a run does, and exchanges a recipe."""
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    from dsbert.base.collectives import gather_json
    from dsbert.cluster import process_group
    from dsbert.cluster.sealed_store import SealedStore

    asked = _count_requests(SealedStore)
    meet_s = timed(lambda: process_group.init(120))
    asked_to_meet = dict(asked)
    recipe = {"recipe": "x" * 6000}
    gather_json(recipe)
    before = sent()
    agree_s = timed(lambda: gather_json(recipe))
    segments, nbytes = (after - early for after, early in zip(sent(), before, strict=True))
    results.put({"meet_s": meet_s, "agree_s": agree_s, "segments": segments, "sent": nbytes, **asked_to_meet})
    results.close()
    results.join_thread()
    gather_json(None)  # rank 0 has the store
    os._exit(0)


def _count_requests(store: Any) -> Counter[str]:
    """Of a class of stores, from now on: requests, and bytes that came of them."""
    asked: Counter[str] = Counter()

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any) -> Any:
            found = call(*args)
            asked["requests"] += 1
            values = found if isinstance(found, list) else [found]
            asked["bytes"] += sum(len(value) for value in values if isinstance(value, bytes))
            return found

        return counting

    for name in ("get", "set", "multi_get", "check", "wait", "add"):
        setattr(store, name, counted(getattr(store, name)))
    return asked


def processes(ranks: int) -> list[dict[str, Any]]:
    """What so many real ranks count and take."""
    fork = multiprocessing.get_context("fork")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    results = fork.Queue()
    started = [fork.Process(target=rank_main, args=(rank, ranks, port, results)) for rank in range(ranks)]
    for process in started:
        process.start()
    found = [results.get(timeout=300) for _ in started]
    for process in started:
        process.join()
    requests, nbytes, segments, told = (
        sum(one[key] for one in found) for key in ("requests", "bytes", "segments", "sent")
    )
    slowest = {key: max(one[key] for one in found) for key in ("meet_s", "agree_s")}
    return [
        row("meet: a rank", ranks, "processes", slowest["meet_s"], requests / ranks, nbytes / ranks),
        row("meet: rank 0's store", ranks, "processes", slowest["meet_s"], requests, nbytes),
        row("gather 6 kB of each", ranks, "processes", slowest["agree_s"], segments / ranks, told / ranks),
    ]


def meeting(ranks: int) -> list[dict[str, Any]]:
    """As `processes` would count, but for how often somebody who waits has asked."""
    own = 1000 + _ADDRESS_BYTES * ranks
    return [
        row("meet: a rank", ranks, "computed", None, 30, own),
        row("meet: rank 0's store", ranks, "computed", own * ranks / _NETWORK_BYTES_PER_S, 30 * ranks, own * ranks),
        row("gather 6 kB of each", ranks, "computed", None, 2 * num_rounds(ranks), 6014 * (ranks - 1)),
    ]


# All ranks as threads


def exchange(ranks: int) -> list[dict[str, Any]]:
    """A step's counts, among threads: every rank must have every row."""
    wires, right = Wires(ranks), [False] * ranks
    expected = torch.arange(ranks)[:, None].expand(ranks, _STEP_NUMBERS)

    def work(rank: int) -> None:
        group: Any = ThreadGroup(wires, rank)
        right[rank] = torch.equal(exchange_rows(torch.full((_STEP_NUMBERS,), rank), group), expected)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]

    def run() -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    run()
    assert all(right)
    return [row("tell all, a step", ranks, "simulated", None, max(wires.messages), max(wires.nbytes))]


# One rank of many


def heartbeats(ranks: int, folder: Path) -> list[dict[str, Any]]:
    """What a survivor, or `dsbert status`, reads."""
    for rank in range(ranks):
        beat = Beat(rank=rank, host="n", pid=1, place="p", beat=1, step=1, progress=1, phase="train", ended=None)
        (folder / f"{rank:05d}.json").write_bytes(json.dumps(beat.to_json()).encode().ljust(1024))
    seconds = timed(lambda: beats_in(folder))
    return [row("look at all heartbeats", ranks, "simulated", seconds, 0, 1024 * ranks, ranks)]


def stragglers(ranks: int) -> list[dict[str, Any]]:
    """What rank 0 thinks after every step."""
    watch = StragglerWatch(["n"] * ranks, [4 if rank % 3 else 5 for rank in range(ranks)])
    times = np.full((ranks, 4), 100_000, dtype=np.int64)
    for _ in range(WINDOW_STEPS):
        watch.add(times)
    seconds = min(timed(lambda: watch.add(times)) for _ in range(5))
    return [row("watch stragglers, a step", ranks, "simulated", seconds, 0, 0, 0)]


def checkpoint(ranks: int, root: Path) -> list[dict[str, Any]]:
    """Save, verify and load as one rank does, and publish as rank 0 does; of all fragments small ones are there."""
    temporary = root / ".new.tmp"
    temporary.mkdir(parents=True)
    files = dict.fromkeys((STATE, TOPOLOGY), b"{}")
    for rank in range(ranks):
        files[fragments_name(rank, ranks)] = bytes(_fragment(rank))
    for name, data in files.items():
        (temporary / name).write_bytes(data)
    import xxhash

    records = {name: FileRecord(bytes=len(data), xxh3=xxhash.xxh3_128_hexdigest(data)) for name, data in files.items()}
    manifest = Manifest(
        kind=KIND, format=FORMAT, step=1, world_size=ranks, topology_digest="0" * 32, attempt="1-a", created=0.0,
        files=records,
    )  # fmt: skip
    told = len(json.dumps({name: record.to_json() for name, record in list(records.items())[-1:]}))
    publisher, target = Publisher(root, "1-a", Retention(2), lambda: None), root / step_name(1)
    published = timed(lambda: publisher.publish(temporary, target, manifest))
    assert verify_checkpoint(target) == []
    whole = timed(lambda: verify_checkpoint(target))
    share = timed(lambda: verify_checkpoint(target, part=(0, ranks)))
    paths = [target / fragments_name(rank, ranks) for rank in range(ranks)]

    def load() -> None:
        reader = FragmentReader(paths)
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            reader.read("w", kind, _SHARD_NUMEL * (ranks - 1), _SHARD_NUMEL)

    rounds, size = num_rounds(ranks), (target / "manifest.json").stat().st_size
    return [
        row("save: publish, rank 0", ranks, "simulated", published, 10 * rounds, told * ranks + size, ranks + 3),
        row("verify all, one process", ranks, "simulated", whole, 0, sum(map(len, files.values())), ranks + 3),
        row("resume: verify a share", ranks, "simulated", share, 4 * rounds, size, 1 + -(-(ranks + 2) // ranks)),
        row("resume: load a shard", ranks, "simulated", timed(load), 0, 12 * _SHARD_NUMEL, ranks),
    ]


def _fragment(rank: int) -> memoryview:
    numbers = torch.full((_SHARD_NUMEL,), float(rank))
    shard = ParamShard(rank * _SHARD_NUMEL, numbers, {"exp_avg": numbers, "exp_avg_sq": numbers})
    return FragmentBuffer().fill({"w": shard})


def mask_update(ranks: int) -> list[dict[str, Any]]:
    """Of BERT-Large at block 1: scores of all blocks round a ring, one decision on every rank, digests."""
    sent = 2 * (ranks - 1) / ranks * 8 * _LARGE_BLOCKS
    seconds = _UPDATE_S_A_BLOCK * _LARGE_BLOCKS + sent / _NETWORK_BYTES_PER_S
    messages = 2 * (ranks - 1) + 4 * num_rounds(ranks)
    return [row("mask update, BERT-Large, block 1", ranks, "computed", seconds, messages, sent)]


def table(ranks: list[int], with_processes: list[int]) -> list[dict[str, Any]]:
    """All rows, part by part."""
    rows: list[dict[str, Any]] = []
    for number in with_processes:
        rows += processes(number)
    for number in ranks:
        rows += meeting(number) + exchange(number) + stragglers(number) + mask_update(number)
        with tempfile.TemporaryDirectory() as folder:
            (beats := Path(folder) / "beats").mkdir()
            rows += heartbeats(number, beats) + checkpoint(number, Path(folder) / "checkpoints")
    parts = list(dict.fromkeys(one["part"] for one in rows))
    return sorted(rows, key=lambda one: (parts.index(one["part"]), one["ranks"], one["how"]))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2,8,32,64,256,1024")
    parser.add_argument("--processes", default="2,8,32")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = [[int(number) for number in text.split(",") if number] for text in (options.ranks, options.processes)]
    rows = table(*found)
    if options.json:
        print(json.dumps({"load": os.getloadavg()[0], "rows": rows}))
        return
    for one in rows:
        one["seconds"] = "" if one["seconds"] is None else f"{one['seconds']:.3g}"
        one["bytes"] = f"{one['bytes']:,}"
    print(f"load {os.getloadavg()[0]:.1f}\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
