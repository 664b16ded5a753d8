"""The low-rank term beside the blocks of a sparse weight: W = blocks + U V, trained together from the first step.

Few blocks leave most inputs of a layer without a way to most of its outputs; U V joins all of them, for r (out + in)
weights. Source: sparse and low rank from the start as in Pixelated Butterfly (Chen et al. 2022, arXiv:2112.00029),
initial values as in LoRA (Hu et al. 2021, arXiv:2106.09685, section 4.1). Not the BERT paper's.

Shapes: T tokens, r rank; U [out, r], V [r, in].
"""

import torch
from torch import Tensor, nn

from dsbert.sparse.half_precision import is_slow

PARTS = ("low_rank_u", "low_rank_v")  # what the layer's parameters are called


def num_low_rank_weights(shape: tuple[int, int], rank: int) -> int:
    """Weights of the term of a weight [out, in]: those of U and V, with every one of which each token is multiplied."""
    return rank * (shape[0] + shape[1])


@torch.no_grad()
def reset_low_rank_(u: Tensor, v: Tensor, std: float, generator: torch.Generator | None = None) -> None:
    """U zero, V normal, truncated at two std, in place; drawn in fp32 on the CPU: the same on every device.

    With U zero the layer begins as its blocks alone, so that its outputs have the variance that they have without the
    term, whatever r. One of the two has to be something else: of the gradients U^T dW and dW V^T the first is zero
    then, and with V zero both would be for ever. V is the one because it reads: with the std of the model's other
    matrices, X V^T is as large as any hidden feature.
    """
    drawn = torch.empty(v.shape)
    nn.init.trunc_normal_(drawn, std=std, a=-2 * std, b=2 * std, generator=generator)
    v.copy_(drawn)
    u.zero_()


def add_low_rank_(y: Tensor, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """y + (X V^T) U^T, in the memory of y [T, out]; x [T, in], all of one dtype. r (in + out) multiplications a token:
    the dense U V is never made."""
    # By rows: so backward takes dU^T = H^T dY, which BLAS has ready, and not dY^T H, 35 times as slow at r = 4.
    by_rows = u.t().contiguous()
    if is_slow(x):
        with torch.autocast("cpu", enabled=False):  # which would take it back
            return y.add_((x.float() @ v.float().t()) @ by_rows.float())
    return y.addmm_(x @ v.t(), by_rows)
