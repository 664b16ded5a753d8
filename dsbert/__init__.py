"""dsbert: structured dynamic sparse pre-training of BERT (arXiv 2108.06277)."""

__version__ = "0.1.0"
