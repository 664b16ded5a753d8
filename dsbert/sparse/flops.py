"""FLOPs as the paper counts them: forward and backward of encoder linears and attention products, no heads, no
embeddings. A multiply-add is two FLOPs; backward costs twice the forward."""

from collections.abc import Iterable


def linear_flops(tokens: int, num_weights: int) -> int:
    """Forward and backward of a linear layer over `tokens` tokens; `num_weights` counts the weights kept."""
    return 3 * 2 * tokens * num_weights


def attention_flops(seq_len: int, hidden_size: int) -> int:
    """Forward and backward of Q K^T and A V over one sequence of one layer."""
    return 3 * 2 * 2 * seq_len * seq_len * hidden_size


def sequence_flops(seq_len: int, hidden_size: int, num_layers: int, encoder_weights: Iterable[int]) -> int:
    """Forward and backward of one sequence. `encoder_weights`: kept weights of every encoder linear."""
    linears = sum(linear_flops(seq_len, weights) for weights in encoder_weights)
    return linears + num_layers * attention_flops(seq_len, hidden_size)
