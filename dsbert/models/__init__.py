"""Models: encoders with block-sparse linear layers, their losses and their fast layers.

spec             the seam: what the rest of dsbert knows of a model; objectives
construction     a recipe's model, made without its dense weights
bert             BERT with MLM and NSP
modern_bert      ModernBERT with MLM
device_batch     what a model is called with: real tokens alone
fast_layers      dropout, attention and linear layers as one pass each
varlen_attention attention within sequences without padding between them
key_mask         what an attention mask hides
residual_norm    residual, dropout and LayerNorm as one pass
vocabulary_loss  the loss of a vocabulary, without its logits
activation_checkpointing  layers that are computed again in backward

Another encoder is a module with a `SPEC`, a line in config/architectures.py, and a recipe.
"""

from dsbert.base.optional_triton import triton_hidden

with triton_hidden():  # transformers' models import torch's compiler
    import torch._dynamo  # noqa: F401  # loaded here, so that it finds none
