"""Block-sparse layers and dynamic sparsity for any torch model.

A library of its own: it needs torch, numpy, pydantic, PyYAML and xxhash, and neither DeepSpeed nor transformers.
"""

from dsbert.sparse.block_editor import BlockEditor, TorchBlockEditor
from dsbert.sparse.config import SparsityConfig
from dsbert.sparse.convert import sparsify_
from dsbert.sparse.draw import DrawKey
from dsbert.sparse.linear import BlockSparseLinear
from dsbert.sparse.mask_manager import MaskManager, MaskUpdate
from dsbert.sparse.regrow import prune_and_regrow
from dsbert.sparse.schedule import UpdateSchedule
from dsbert.sparse.sparsity_errors import KernelError, SparsityError
from dsbert.sparse.topology import BlockTopology, TopologyUpdate

__all__ = [
    "BlockEditor",
    "BlockSparseLinear",
    "BlockTopology",
    "DrawKey",
    "KernelError",
    "MaskManager",
    "MaskUpdate",
    "SparsityConfig",
    "SparsityError",
    "TopologyUpdate",
    "TorchBlockEditor",
    "UpdateSchedule",
    "prune_and_regrow",
    "sparsify_",
]
