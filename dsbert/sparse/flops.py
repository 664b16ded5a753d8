"""FLOPs as the paper counts them: forward and backward of encoder linears and attention products, no heads, no
embeddings. A multiply-add is two FLOPs; backward costs twice the forward."""

from collections.abc import Iterable


def linear_flops(tokens: int, num_weights: int) -> int:
    """Forward and backward of a linear layer over `tokens` tokens; `num_weights` counts the weights kept."""
    return 3 * 2 * tokens * num_weights


def attention_flops(pairs: int, hidden_size: int) -> int:
    """Forward and backward of Q K^T and A V over `pairs` pairs of a query and a key: all seq_len^2 of a sequence, or as
    many as may see each other."""
    return 3 * 2 * 2 * pairs * hidden_size


def sequence_flops(tokens: int, hidden_size: int, attention_pairs: int, encoder_weights: Iterable[int]) -> int:
    """Forward and backward of a sequence, or of many with so many tokens in all. `attention_pairs`: over all layers;
    `encoder_weights`: kept weights of every encoder linear."""
    linears = sum(linear_flops(tokens, weights) for weights in encoder_weights)
    return linears + attention_flops(attention_pairs, hidden_size)
