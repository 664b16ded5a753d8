"""dsbert: structured dynamic sparse pre-training of BERT (arXiv 2108.06277).

`dsbert.Run` is a run for notebooks and scripts (reports/api.py); start.py runs modules of this very package, wherever
it is started.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsbert.base.errors import CheckpointError, DsbertError, UserError
    from dsbert.reports.api import Run

__version__ = "0.1.0"

__all__ = ["CheckpointError", "DsbertError", "Run", "UserError", "__version__"]

# Where each name stands: loaded with its first use, so that a command loads no more than it needs.
_HOMES = {
    "CheckpointError": "base.errors",
    "DsbertError": "base.errors",
    "Run": "reports.api",
    "UserError": "base.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
