"""Block-sparse products in C++ with the vectors of the machine, compiled on first use."""

from dsbert.sparse.kernels.cpu.backend import BACKEND, dropout, gelu_gradient

__all__ = ["BACKEND", "dropout", "gelu_gradient"]
