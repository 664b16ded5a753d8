"""Block-sparse layers and dynamic sparsity for any torch model.

    config           which weights are sparse, how, and how the pattern moves; sparsity_errors.py what cannot be had
    convert          replaces a model's linear layers; linear.py is the layer, low_rank.py the term beside its blocks
    topology         where the blocks of one weight stand; balance.py as many in every row or column
    draw             random choices without a generator
    mask_manager     one collective decision per update: regrow.py which blocks, schedule.py when and how many
    block_editor     how the manager reaches weights and moments; flat_blocks.py blocks in a slice of a flat parameter
    fresh_moments    what Adam knows of a block that was just regrown
    journal          the updates as JSON, to be replayed; update_norms.py what they kept and dropped, in a few numbers
    magnitude        cuts a dense weight to its largest blocks
    group_lasso      pulls whole blocks towards zero; flops.py counts as the paper does
    kernel_plan      which kernels a model runs on, alike on all ranks; kernels/ the products themselves
    half_precision   where a CPU is better off in fp32

A library of its own: it needs torch, numpy, pydantic and xxhash, and neither DeepSpeed nor transformers. `REGROW_RULES`
(regrow.py) and `PRUNE_SCORES` (flat_blocks.py) are tables that a program may add to.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# Where each name stands: torch is loaded with the first that needs it, and recipes are read without.
_HOMES = {
    "BlockEditor": "block_editor",
    "TorchBlockEditor": "block_editor",
    "SparsityConfig": "config",
    "sparsify_": "convert",
    "DrawKey": "draw",
    "BlockSparseLinear": "linear",
    "MaskManager": "mask_manager",
    "MaskUpdate": "mask_manager",
    "prune_and_regrow": "regrow",
    "UpdateSchedule": "schedule",
    "KernelError": "sparsity_errors",
    "SparsityError": "sparsity_errors",
    "BlockTopology": "topology",
    "TopologyUpdate": "topology",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
