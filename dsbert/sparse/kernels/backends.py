"""All backends by name."""

from dsbert.sparse.kernels import cpu, dense, reference, triton_gpu
from dsbert.sparse.kernels.index import Backend

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        reference.BACKEND,
        cpu.BACKEND,
        triton_gpu.BACKEND,
        dense.BACKEND,
        dense.ONEDNN,
        dense.FP32,
    )
}
# Those that compute the whole dense product.
DENSE = (dense.BACKEND.name, dense.ONEDNN.name, dense.FP32.name)
