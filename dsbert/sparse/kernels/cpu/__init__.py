"""Block-sparse products and attention in C++ with the vectors of the machine.

build.py compiles them on first use, backend.py calls the products and dropout, attention.py attention.
"""

from dsbert.sparse.kernels.cpu.backend import BACKEND, dropout, gelu_gradient

__all__ = ["BACKEND", "dropout", "gelu_gradient"]
