"""What a run was made with, for its config.yaml and its checkpoints."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

# The revision of dsbert's arithmetic. Raised by whoever changes what a run of the same recipe gives by more than
# rounding: 2 draws dropout for tokens alone, where 1 drew it for padding as well.
NUMERICS = 2
_VERSIONED = ("dsbert", "torch", "deepspeed", "transformers", "tokenizers", "numpy")


def versions() -> dict[str, str | None]:
    """Of python and of the packages that results depend on; None for one that is not installed."""
    return {"python": sys.version.split()[0]} | {name: _version(name) for name in _VERSIONED}


def git_revision() -> str | None:
    """The checkout's revision, with "+changes" if it has uncommitted ones; None outside of a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
