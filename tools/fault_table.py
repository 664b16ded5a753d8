"""Run the fault tests, exhaustive ones too, and print what they saw, a row per fault: docs/faults.md holds this table.

    python tools/fault_table.py [--json] [-- PYTEST ARGUMENTS]

The faults of SLURM, networks and file systems need root and Debian's packages, which CI=true gets. Where those are
missing, their rows are, too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from on_ranks import markdown

TESTS = (
    "tests/test_faults.py", "tests/test_surroundings.py", "tests/cluster/test_rendezvous.py",
    "tests/training/test_corruption.py", "tests/training/test_slow_rank.py", "tests/jobs/test_slurm.py",
)  # fmt: skip
ROWS_ENV = "DSBERT_FAULT_ROWS"  # tests/fault_rows.py writes there


def main() -> None:
    """Exit with pytest's code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("pytest", nargs="*", default=list(TESTS), help="instead of all fault tests")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-m", "", *options.pytest],
            env=os.environ | {ROWS_ENV: str(path)},
            stdout=sys.stderr,
            check=False,
        )
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows.sort(
        key=lambda row: (row["fault"] == "-", [int(number) for number in row["fault"].split(", ") if number != "-"])
    )
    print(json.dumps(rows) if options.json else markdown([_shown(row) for row in rows]) if rows else "no rows")
    sys.exit(done.returncode)


def _shown(row: dict[str, Any]) -> dict[str, str]:
    culprit = row["culprit"] or {}
    named = f"rank {culprit['rank']}" if "rank" in culprit else culprit.get("named", "")
    if "host" in culprit:
        named += f" on {culprit['host']}, step {culprit['step']}"
    codes = ["stopped" if code is None else str(code) for code in row["codes"]] or ["killed"]
    if len(codes) > 4 and len(set(codes)) == 1:
        codes = [f"all {codes[0]}"]
    return {
        "fault": row["fault"],
        "what was done, what happened": row["what"],
        "s": str(row["seconds"]),
        "exit codes by rank": ", ".join(codes),
        "named": named or "-",
        "final state identical": "yes" if row["identical"] else "-",
    }


if __name__ == "__main__":
    main()
