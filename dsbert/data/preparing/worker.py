"""What a worker process does: it takes tasks as JSON lines (worker_pool.py)."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from dsbert.cluster.launcher import die_with_parent
from dsbert.data.preparing.sentences import is_panic
from dsbert.data.preparing.tasks import Task, failure_of


def perform(task: Task) -> dict[str, Any]:
    """Do a task, task["do"] says which. Raises what that does; RuntimeError for a panic, which is no Exception."""
    try:
        return _kinds()[task["do"]](task)
    except BaseException as error:
        if not is_panic(error):
            raise
        file = (task.get("file") or task.get("piece") or {}) if task["do"] in ("cut", "read") else {}
        raise RuntimeError(f"a library gave up in {task['do']} {json.dumps(file)}: {error}") from None


def _kinds() -> dict[str, Callable[[Task], dict[str, Any]]]:
    from dsbert.data.preparing.merging import encode_piece, merge_shard
    from dsbert.data.preparing.plan import cut_files
    from dsbert.data.preparing.spool import spool_piece

    return {"cut": cut_files, "read": spool_piece, "encode": encode_piece, "merge": merge_shard}


def main() -> None:
    """Answer each line of standard input with a line on standard output, until the input ends."""
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer
    for line in sys.stdin:
        try:
            answer = {"result": perform(json.loads(line))}
        except Exception as error:
            failure = failure_of(error)
            if failure.kind is None:
                traceback.print_exc()
            answer = {"failure": vars(failure)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
