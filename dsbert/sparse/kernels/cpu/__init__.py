"""Block-sparse products and attention in C++ with the vectors of the machine.

build.py compiles them on first use, backend.py calls the products and dropout, attention.py attention.
"""

from dsbert.sparse.kernels.cpu.backend import (
    BACKEND,
    NormDropout,
    cross_entropy_,
    dropout,
    gelu_gradient,
    norm,
    norm_gradient,
)

__all__ = ["BACKEND", "NormDropout", "cross_entropy_", "dropout", "gelu_gradient", "norm", "norm_gradient"]
