"""The three products of a block-sparse linear layer, behind one interface.

    forward  Y  = X W^T + b      X [T, in], Y [T, out]
    dgrad    dX = dY W
    wgrad    dW at the active blocks: [K, B, B]

A backend is a module with these three functions; it reads where the blocks stand from a `KernelIndex` and nothing
else, which is why the digest of a topology is taken from that index.
"""

from dsbert.sparse.kernels import dense, reference
from dsbert.sparse.kernels.index import Backend, KernelIndex

# "auto" is the scatter into a dense scratch: on CPU at the densities used here it beats the gather of the reference.
BACKENDS: dict[str, Backend] = {"auto": dense.BACKEND, "dense": dense.BACKEND, "reference": reference.BACKEND}

__all__ = ["BACKENDS", "Backend", "KernelIndex"]
