"""Block-sparse products in C++ with the vectors of the machine, compiled on first use."""

from dsbert.sparse.kernels.cpu.backend import BACKEND, gelu_gradient

__all__ = ["BACKEND", "gelu_gradient"]
