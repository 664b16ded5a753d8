"""Activation checkpointing: of each encoder layer only its input is kept for backward, which computes the rest again.

Memory for the layers' activations falls to one layer's and an input per layer, for a third more work. In the second
pass the same falls in dropout: its seeds come from torch's generator, whose state is put back. So a step is the same to
the bit.
Source: Chen et al. 2016, arXiv:1604.06174.
"""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpoint_activations_(model: nn.Module) -> None:
    """Have every encoder layer of a model of transformers be computed again in backward, while training."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert layers, "no layer of this encoder can be computed again"
    for layer in layers:
        layer.gradient_checkpointing = True
        # The other kind, reentrant, hides parameters from autograd, and so from the hooks of ZeRO stage 3.
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=True)
