"""Where compiled kernels and measured choices are kept between processes."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """DSBERT_CACHE, else dsbert below XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("DSBERT_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsbert"
