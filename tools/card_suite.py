"""Everything that a machine with a CUDA card can tell, in one command of a given length.

    python tools/card_suite.py --out runs/card [--minutes 10] [--text DIR] [--wheels DIR] [--only a,b] [--dry-run]

In this order: parity of every kernel with float64, the GPU tests, products against cuBLAS and a peer, whole steps,
training on real text with a kill and a resume, other launches of the kernels (card_stages.py says more). Each stage is
a process with a time limit: its share of what is left, so that what one does not need goes to those behind it.

Written as it is found, so that a cut-off loses only what is to come: suite.jsonl (a line per figure), tables.md,
log.txt. --text: text, or what `dsbert prepare` has made of one; without it nothing is trained. --wheels: what
tools/carry_wheels.py has collected, installed for this command alone. --dry-run goes the same way with tiny shapes on
the CPU, and says nothing about speed. Exit code 1: a stage failed or was cut off; 2: no CUDA device.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from card_records import add, read
from card_stages import ROOT, SKIPPED, STAGES
from card_tables import render

# How the time is shared: parity compiles all kernels, training has two starts and a text to prepare beside its two
# minutes.
SHARES = {"parity": 1.3, "tests": 1.6, "products": 2.0, "steps": 2.3, "training": 3.0, "tuning": 0.8}
_POLL_S = 0.5
_LOOK = (
    "import json, torch, transformers\n"
    "try: import triton; found = triton.__version__\n"
    "except ImportError: found = 'missing'\n"
    "card = torch.cuda.get_device_name() if torch.cuda.is_available() else None\n"
    "versions = {'torch': torch.__version__, 'triton': found, 'transformers': transformers.__version__}\n"
    "print(json.dumps({'device': card, 'versions': versions}))"
)


def options_from(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--only", default=",".join(STAGES), metavar="STAGES", help="with commas")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(words)
    options.only = options.only.split(",")
    if unknown := {*options.only} - {*STAGES}:
        parser.error(f"expected --only of {', '.join(STAGES)}, found {', '.join(sorted(unknown))}")
    return options


class Suite:
    """The files of a suite, and what runs into them.

    out: a folder; what an earlier suite left in it is begun anew. environment: of every stage. until: time.monotonic()
    when all must be over.
    """

    def __init__(self, out: Path, environment: dict[str, str], until: float) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.records, self._tables, self._log = out / "suite.jsonl", out / "tables.md", out / "log.txt"
        for file in (self.records, self._tables, self._log):
            file.unlink(missing_ok=True)
        self._environment, self._until = environment, until
        self.sound = True

    def run(self, name: str, command: list[str], limit_s: float) -> str:
        """Run a stage in a session of its own, and end that with it; how it ended: done, skipped, failed, cut off."""
        began = time.monotonic()
        with self._log.open("ab") as log:
            log.write(f"== {name}: {limit_s:.0f} s at most\n".encode())
            log.flush()
            process = subprocess.Popen(
                command, cwd=ROOT, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
            try:
                self._wait(process, began + limit_s)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # also of what a stage that has ended left behind
        code = process.wait()
        outcome = {0: "done", SKIPPED: "skipped"}.get(code, "failed")
        if outcome == "failed" and time.monotonic() >= began + limit_s:
            outcome = "cut off"
        seconds = {"seconds": round(time.monotonic() - began, 1), "limit_s": round(limit_s, 1)}
        why = "" if code == 0 else self._last_line()
        add(self.records, {"stage": name, "kind": "outcome", "of": name, "outcome": outcome, **seconds, "why": why})
        self.write_tables()
        self.sound &= outcome in ("done", "skipped")
        return outcome

    def limit_s(self, name: str, pending: list[str]) -> float:
        """What a stage may take of the seconds that are left: its share among those that are still to come."""
        return max(0.0, self._until - time.monotonic()) * SHARES[name] / sum(SHARES[other] for other in pending)

    def write_tables(self) -> str:
        """The page of all that has been found so far."""
        page = render(read(self.records))
        self._tables.write_text(page, encoding="utf-8")
        return page

    def _wait(self, process: subprocess.Popen[bytes], until: float) -> None:
        size = -1
        while process.poll() is None and time.monotonic() < until:
            time.sleep(_POLL_S)
            if self.records.exists() and self.records.stat().st_size != size:
                size = self.records.stat().st_size
                self.write_tables()

    def _last_line(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n== ")[-1].strip().splitlines()
        return lines[-1][:200].replace("|", "/") if len(lines) > 1 else ""


def main(words: list[str] | None = None) -> int:
    """All stages, one after the other."""
    options = options_from(words)
    until = time.monotonic() + 60 * options.minutes
    work = Path(tempfile.mkdtemp(prefix="card-suite-"))
    try:
        environment = _environment(options, work)
        look = [sys.executable, "-c", _LOOK]
        done = subprocess.run(look, env=environment, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        if not options.dry_run and found["device"] is None:
            print("card_suite: expected a CUDA device, found none; --dry-run needs none", file=sys.stderr)
            return 2
        device = found["device"] or "A dry run: no times"
        suite = Suite(options.out, environment, until)
        add(suite.records, {"stage": "suite", "kind": "suite", "device": device, "versions": found["versions"]})
        pending = [name for name in STAGES if name in options.only]
        while pending:
            name, limit_s = pending[0], suite.limit_s(pending[0], pending)
            command = [sys.executable, str(ROOT / "tools" / "card_stages.py"), name, "--seconds", str(limit_s)]
            command += ["--records", str(suite.records.resolve()), "--work", str(work)]
            command += ["--text", str(options.text.resolve())] if options.text else []
            outcome = suite.run(name, command + ["--dry-run"] * options.dry_run, limit_s)
            print(f"{name}: {outcome}", file=sys.stderr, flush=True)
            pending.pop(0)
        print(suite.write_tables())
        return 0 if suite.sound else 1
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _environment(options: argparse.Namespace, work: Path) -> dict[str, str]:
    """Of the stages: dsbert and the tools of this checkout, before them what was carried here."""
    paths = [str(ROOT), str(ROOT / "tools")]
    if options.wheels:
        site = work / "site"
        wheels = sorted(map(str, options.wheels.glob("*.whl")))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*pip, "--target", str(site), *wheels], check=True)
        paths.insert(0, str(site))
    path = os.pathsep.join(filter(None, [*paths, os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    if options.dry_run:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


if __name__ == "__main__":
    sys.exit(main())
