"""One rank of `run_distributed`: python -m tests.run_rank MODULE:FUNCTION JSON-ARGUMENTS RESULT-FILE."""

import importlib
import json
import sys
from pathlib import Path

from dsbert.launch import die_with_parent


def main(name: str, arguments: str, result: str) -> None:
    """Call the function, and write what it returns as JSON."""
    die_with_parent()
    module, _, function = name.partition(":")
    value = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    Path(result).write_text(json.dumps(value))


if __name__ == "__main__":
    main(*sys.argv[1:])
