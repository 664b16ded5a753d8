"""Kill a run again and again, in the middle of everything, and see that it ends as if nothing had happened.

    python tools/chaos.py --kills 50 --seed 1 [--json]

An undisturbed run is the measure. Then the same run is killed and resumed: SIGKILL or SIGTERM, to one rank or to all,
in phases that the ranks publish in their heartbeats: while a checkpoint is written, between the first fragment and its
publication, in mask updates, in evaluations, while starting, at steps. A run that gets to its end before enough kills
were made is compared and followed by another one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

from dsbert.base.durable import checksum
from dsbert.checkpoint.loading import LATEST
from dsbert.inspection.audit_run import audit

RECIPE = (
    "model.hidden_size=64", "model.num_layers=2", "model.max_positions=32", "data.seq_len=24", "model.dropout=0.1",
    "sparsity.block_size=4", "sparsity.sparsity=0.75", "sparsity.num_updates=30", "batch.global_batch=12",
    "batch.micro_batch=3", "optim.total_steps=150", "optim.warmup_steps=20", "eval.every_steps=5", "eval.sequences=48",
    "checkpoint.every_steps=4", "checkpoint.max_mb_per_s=4", "log.every_steps=1", "log.wandb=false",
)  # fmt: skip
# The least number of kills in each phase, of 50; the others come at steps. "between" the first fragment and publication
# counts as a save as well.
QUOTAS = {"between": 4, "save": 8, "update": 6, "evaluate": 6, "start": 6}
_SILENCE_S = 60.0  # of a run that says nothing: more than its --timeout, its grace and a start


class Process(Protocol):
    """What was started: a launcher and its ranks, or the ranks alone."""

    def pids(self) -> list[int]: ...
    def poll(self) -> int | None: ...
    def said_bytes(self) -> int: ...


@dataclass
class Launcher:
    """`dsbert WORDS --nproc N` as a user starts it."""

    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(cls, words: list[str], ranks: int, log: Path) -> Launcher:
        with log.open("ab") as file:
            command = [sys.executable, "-m", "dsbert", *words, "--nproc", str(ranks)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            return cls(subprocess.Popen(command, stdout=file, stderr=file, env=environment), log)

    def pids(self) -> list[int]:
        with suppress(psutil.NoSuchProcess):
            return [process.pid for process in psutil.Process(self.process.pid).children()]
        return []

    def poll(self) -> int | None:
        return self.process.poll()

    def said_bytes(self) -> int:
        return self.log.stat().st_size


@dataclass
class Report:
    """What came of it: the keys of --json.

    kills_by_phase sums up to kills; kills_before_publication: those of the saves that came after a first fragment was
    whole. steps_lost: taken again after a resume. resumed_from_scratch: although `latest` had named a checkpoint.
    """

    kills: int = 0
    kills_by_phase: Counter[str] = field(default_factory=Counter)
    kills_before_publication: int = 0
    signals: Counter[str] = field(default_factory=Counter)
    targets: Counter[str] = field(default_factory=Counter)
    identical: bool = True
    torn_latest: int = 0
    resumed_from_scratch: int = 0
    steps_lost: int = 0
    runs: int = 0
    exit_codes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


class Chaos:
    """start(words, ranks, log) -> Process. words: the command line of a run but for --run-dir."""

    def __init__(
        self, words: list[str], folder: Path, seed: int, ranks: int, start: Callable[[list[str], int, Path], Process]
    ) -> None:
        self._words, self._folder, self._ranks, self._start = words, folder, ranks, start
        self._random = random.Random(seed)
        self.report = Report()
        self._target: dict[str, str] = {}

    def run(self, kills: int, quotas: dict[str, int], progress: Callable[[int], object] = lambda done: None) -> Report:
        """Make the measure, then kill. Raises RuntimeError if a run hangs or fails by itself."""
        began = time.monotonic()
        measure = self._folder / "undisturbed"
        code = self._wait(self._begin(measure), None)
        if code != 0:
            raise RuntimeError(f"expected the undisturbed run to end with 0, found {code}: see {self._folder}/log")
        self._target = final_state(measure)
        left = Counter(quotas)
        while self.report.kills < kills:
            self._one_run(kills, left, progress)
        self.report.seconds = round(time.monotonic() - began, 1)
        return self.report

    def _one_run(self, kills: int, left: Counter[str], progress: Callable[[int], object]) -> None:
        self.report.runs += 1
        run = self._folder / f"run-{self.report.runs}"
        watch = LatestWatch(run)
        code: int | None = None
        while code != 0:
            hunt = None
            if self.report.kills < kills:
                wanted = self._choose(left, kills)
                hunt = Hunt(run, wanted, self._random, self._ranks)
            code = self._wait(self._begin(run), hunt)
            watch.check()
            if hunt and hunt.hit:
                self.report.kills += 1
                self.report.kills_by_phase["save" if hunt.hit == "between" else hunt.hit] += 1
                self.report.kills_before_publication += hunt.hit == "between"
                self.report.signals[hunt.signal.name] += 1
                self.report.targets["all ranks" if hunt.everybody else "one rank"] += 1
                self.report.exit_codes[str(code)] += 1
                left[hunt.hit] -= 1
                progress(self.report.kills)
            elif code != 0:
                raise RuntimeError(
                    f"expected a run that nobody kills to end with 0, found {code}: see {self._folder}/log"
                )
        watch.close()
        self.report.torn_latest += watch.torn
        attempts = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
        self._account(attempts, watch.first_at)
        self.report.identical &= final_state(run) == self._target

    def _choose(self, left: Counter[str], kills: int) -> str:
        open_quotas = [phase for phase, count in left.items() if count > 0]
        if not open_quotas:
            return "train"
        missing = sum(left[phase] for phase in open_quotas)
        if self._random.random() < 1.2 * missing / max(1, kills - self.report.kills):
            return self._random.choice(open_quotas)
        return "train"

    def _begin(self, run: Path) -> Process:
        return self._start([*self._words, "--run-dir", str(run)], self._ranks, self._folder / "log")

    def _wait(self, process: Process, hunt: Hunt | None) -> int:
        heard, size = time.monotonic(), -1
        while (code := process.poll()) is None:
            if process.said_bytes() != size:
                heard, size = time.monotonic(), process.said_bytes()
            if time.monotonic() - heard > _SILENCE_S:
                for pid in process.pids():
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                raise RuntimeError(f"expected every run to go on or to end, found one silent for {_SILENCE_S:g} s")
            if hunt and not hunt.hit:
                hunt.look(process)
            else:
                time.sleep(0.01)
        if hunt and hunt.hit:
            hunt.settle()
        return code

    def _account(self, attempts: list[dict[str, Any]], first_checkpoint: float | None) -> None:
        """Steps that were taken again, and starts from nothing although a checkpoint was there."""
        for before, after in itertools.pairwise(attempts):
            resumed = int(after["checkpoint"].removeprefix("step_")) if after["checkpoint"] else 0
            last = (after["previous"] or {}).get("step") or int(
                (before["checkpoint"] or "step_0").removeprefix("step_")
            )
            self.report.steps_lost += max(0, last - resumed)
            if after["checkpoint"] is None and first_checkpoint and after["started"] > first_checkpoint:
                self.report.resumed_from_scratch += 1


class Hunt:
    """Waits for a phase in the heartbeats of an attempt, and kills in it.

    hit: the phase in which the victim was, by its own last word; None while nothing was killed.
    """

    def __init__(self, run: Path, wanted: str, chance: random.Random, ranks: int) -> None:
        self._run, self.wanted = run, wanted
        self.signal = signal.SIGTERM if chance.random() < 0.35 else signal.SIGKILL
        self.everybody = chance.random() < 0.4
        self._victim = chance.randrange(ranks)
        self._steps = chance.randint(1, 9)  # taken before the kill, so that a run gets on
        self._at = time.monotonic() + chance.uniform(0.2, 4.0)
        self._known = {path.name for path in (run / "heartbeats").glob("*")}
        self._directory: Path | None = None
        self._first_step: int | None = None
        self.hit: str | None = None

    def look(self, process: Process) -> None:
        """Kill if it is time."""
        if self.wanted == "start":
            if time.monotonic() > self._at and len(process.pids()) > self._victim:
                pids = process.pids()
                self._kill(pids if self.everybody else [pids[self._victim]], "start")
            time.sleep(0.01)
            return
        records = self._records()
        victim = records.get(self._victim)
        if victim is None or _phase(victim) == "start":
            time.sleep(0.01)
            return
        if self._first_step is None:
            self._first_step = victim["step"]
        if victim["step"] >= self._first_step + self._steps and self._suits(_phase(victim)):
            pids = [record["pid"] for record in records.values()] if self.everybody else [victim["pid"]]
            self._kill(pids, _phase(victim))

    def settle(self) -> None:
        """After a SIGKILL the victim's last word says where it died."""
        victim = self._records().get(self._victim)
        if self.signal == signal.SIGKILL and victim is not None:
            self.hit = _phase(victim)

    def _suits(self, phase: str) -> bool:
        return phase == self.wanted or (self.wanted == "save" and phase == "between")

    def _kill(self, pids: list[int], phase: str) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, self.signal)
        self.hit = phase

    def _records(self) -> dict[int, dict[str, Any]]:
        if self._directory is None:
            fresh = [path for path in (self._run / "heartbeats").glob("*") if path.name not in self._known]
            if not fresh:
                return {}
            self._directory = fresh[0]
        records = {}
        for path in self._directory.glob("0*.json"):
            with suppress(OSError, ValueError):
                record = json.loads(path.read_text())
                records[record["rank"]] = record
        return records


class LatestWatch:
    """Verifies whatever `latest` names, as soon as it names it, from a thread."""

    def __init__(self, run: Path) -> None:
        self._root = run / "checkpoints"
        self.torn = 0
        self.first_at: float | None = None
        self._seen = ""
        self._closed = threading.Event()
        self._lock = threading.Lock()
        threading.Thread(target=self._run, daemon=True).start()

    def check(self) -> None:
        with self._lock, suppress(FileNotFoundError):
            named = (self._root / LATEST).read_text()
            if named == self._seen:
                return
            self._seen = named
            self.first_at = self.first_at or time.time()
            name, manifest = named.split()
            path = self._root / name
            if not audit(path)["ok"] or checksum(path / "manifest.json") != manifest:
                self.torn += 1
                print(f"torn: {named}", file=sys.stderr)

    def close(self) -> None:
        self.check()
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(0.05):
            self.check()


def final_state(run: Path) -> dict[str, str]:
    """Checksums of weights, moments and topology of the last checkpoint."""
    last = max((run / "checkpoints").glob("step_" + "[0-9]" * 8))
    return {"step": last.name} | {path.name: checksum(path) for path in sorted(last.glob("*.safetensors"))}


def _phase(record: dict[str, Any]) -> str:
    """What chaos calls it: start | between | save | update | evaluate | train."""
    if record["phase"] in ("start", "load"):
        return "start"
    if record["phase"] in ("update", "evaluate"):
        return str(record["phase"])
    if record["saving"] in ("written", "publishing"):
        return "between"
    return "save" if record["saving"] or record["phase"] == "save" else "train"


def write_text(path: Path, seed: int, documents: int = 80) -> None:
    """A corpus: sentences of made-up words, a blank line between documents."""
    chance = random.Random(seed)
    words = ["".join(chance.choice("bdfgklmnprst") + chance.choice("aeiou") for _ in range(3)) for _ in range(150)]
    lines = []
    for _ in range(documents):
        for _ in range(chance.randint(5, 14)):
            lines.append(" ".join(chance.choice(words) for _ in range(chance.randint(4, 12))).capitalize() + ".")
        lines.append("")
    path.write_text("\n".join(lines))


def main() -> None:
    """Parse, prepare data, kill, report; exit code 1 unless all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the runs stay to be looked at; default: removed")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    from dsbert.base.progress import stage_bars

    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary, stage_bars() as bars:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "text.txt", arguments.seed)
        prepare = ["prepare", "--source", str(folder / "text.txt"), "--to", str(folder / "data"), "--vocab-size", "300"]
        subprocess.run([sys.executable, "-m", "dsbert", *prepare, "--validation", "0.2"], check=True, stdout=sys.stderr)
        words = ["pretrain", "demo", "--timeout", "10", f"data.path={folder / 'data'}", *RECIPE]
        chaos = Chaos(words, folder, arguments.seed, arguments.ranks, Launcher.start)
        quotas = {phase: -(-count * arguments.kills // 50) for phase, count in QUOTAS.items()}
        report = chaos.run(arguments.kills, quotas, lambda done: bars("kills", done, arguments.kills))
    found = {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(report).items()}
    if arguments.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:<22} {value}")
    sys.exit(not report.identical or bool(report.torn_latest or report.resumed_from_scratch))


if __name__ == "__main__":
    main()
