"""One rank of `run_distributed`."""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path

from dsbert.cluster.launcher import PARENT_PID_ENV, die_with_parent


def main(name: str, arguments: str, environment: dict[str, str], log: str, result: str) -> None:
    """In a forked process: call the function "module:function", and write what it returns as JSON."""
    os.setsid()
    os.environ.update(environment)
    os.environ["DSBERT_TEST_RESULT"] = result  # for a rank that is to end in the middle of something
    os.environ[PARENT_PID_ENV] = str(os.getppid())
    die_with_parent()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    code = 0
    try:
        module, _, function = name.partition(":")
        value = getattr(importlib.import_module(module), function)(**json.loads(arguments))
        Path(result).write_text(json.dumps(value))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a communicator whose peer is gone may hang or abort in the interpreter's teardown
