"""Attention within sequences that stand one behind the other, without padding between them.

Legend: n sequences, T tokens in all of them, h heads, d head size, L tokens of the longest sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dsbert.sparse.half_precision import is_slow


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    window: int | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """softmax(Q K^T scaling) V within each sequence: q, k, v [T, h, d] -> [T, h, d].

    starts: int64 [n + 1] on the CPU, where each sequence begins, and T. dropout: of the shares. scaling: 1/sqrt(d)
    where None. window: how many tokens to each side are seen; None: all. visible: bool [T], keys that are seen; a query
    that sees none has finite numbers. T may be 0.
    """
    if is_slow(query):
        q, k, v = query.float(), key.float(), value.float()
        found = varlen_attention(q, k, v, starts, dropout=dropout, scaling=scaling, window=window, visible=visible)
        return found.to(query.dtype)
    device, (num_tokens, heads, size) = query.device, query.shape
    lengths = starts.diff()
    longest = int(lengths.max()) if lengths.numel() else 0
    inside = torch.arange(longest) < lengths[:, None]  # [n, L]
    places = inside.view(-1).nonzero()[:, 0].to(device)  # of the tokens, in padded rows
    inside = inside.to(device)

    def padded(x: Tensor) -> Tensor:
        rows = x.new_zeros(inside.numel(), heads * size).index_copy(0, places, x.reshape(num_tokens, -1))
        return rows.view(-1, longest, heads, size).transpose(1, 2).reshape(-1, longest, size)  # [n h, L, d]

    seen = inside if visible is None else torch.zeros_like(inside).view(-1).index_copy(0, places, visible)
    seen = seen.view(-1, 1, 1, longest)
    if window is not None:
        columns = torch.arange(longest, device=device)
        seen = seen & ((columns - columns[:, None]).abs() <= window)
    scores = torch.bmm(padded(query) * (size**-0.5 if scaling is None else scaling), padded(key).transpose(1, 2))
    # Finite, so that a query that sees nothing has shares, too.
    hidden = torch.zeros(seen.shape, dtype=scores.dtype, device=device)
    hidden.masked_fill_(~seen, torch.finfo(scores.dtype).min / 2)
    scores.view(-1, heads, longest, longest).add_(hidden)
    shares = functional.dropout(torch.softmax(scores, -1), dropout)
    found = torch.bmm(shares, padded(value)).view(-1, heads, longest, size).transpose(1, 2)
    return found.reshape(-1, heads * size).index_select(0, places).view(num_tokens, heads, size)
