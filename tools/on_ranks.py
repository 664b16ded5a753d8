"""Run a tool's worker on several ranks of this machine, and hand its results to the tool."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsbert.cluster.launcher import die_with_parent, launch
from dsbert.cluster.ranks import ranks_from_environment

_RESULTS = "DSBERT_TOOL_RESULTS"


def is_rank() -> bool:
    """Whether this is a rank that `on_ranks` has started."""
    return bool(os.environ.get(_RESULTS)) and ranks_from_environment() is not None


def on_ranks(worker: Callable[[dict[str, Any]], Any], arguments: dict[str, Any], nproc: int) -> list[Any]:
    """worker(arguments) on every rank, each in a fresh process; what each returned (JSON), by rank.

    Called by the tool, this starts the tool again on every rank; called there, it runs the worker and ends the process.
    Exits with the ranks' code if one failed.
    """
    if is_rank() and (ranks := ranks_from_environment()):
        die_with_parent()
        value = worker(json.loads(os.environ["DSBERT_TOOL_ARGUMENTS"]))
        (Path(os.environ[_RESULTS]) / f"{ranks.rank}.json").write_text(json.dumps(value))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {_RESULTS: folder, "DSBERT_TOOL_ARGUMENTS": json.dumps(arguments)}
        code = launch([sys.executable, *sys.argv], nproc)
        del os.environ[_RESULTS]
        if code:
            sys.exit(code)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(nproc)]


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table with the keys of the first row as its head."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([str(row[key]) for key in head] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
