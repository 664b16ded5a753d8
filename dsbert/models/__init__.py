"""Models: BERT with block-sparse linear layers, its losses and its fused layers.

bert             BERT with MLM and NSP, made without its dense weights
bert_layers      dropout, attention and linear layers as one pass each
"""

from dsbert.base.optional_triton import triton_hidden

with triton_hidden():  # transformers' models import torch's compiler
    import torch._dynamo  # noqa: F401
