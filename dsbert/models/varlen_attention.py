"""Attention within sequences that stand one behind the other, without padding between them.

Legend: n sequences, T tokens in all of them, h heads, d head size, L tokens of the longest sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    from dsbert.models.fast_layers import drop  # which imports this module
    from dsbert.sparse.half_precision import is_slow

    if is_slow(query):
        q, k, v = query.float(), key.float(), value.float()
        found = varlen_attention(q, k, v, starts, dropout=dropout, scaling=scaling, window=window, visible=visible)
        return found.to(query.dtype)
    device, (_, heads, size) = query.device, query.shape
    lengths = starts.diff()
    longest = int(lengths.max()) if lengths.numel() else 0
    inside = (torch.arange(longest) < lengths[:, None]).to(device)  # [n, L]
    rows, columns = inside.nonzero(as_tuple=True)
    shape = (len(lengths), longest, heads, size)
    q, k, v = (
        x.new_zeros(shape).index_put((rows, columns), x).transpose(1, 2).reshape(-1, longest, size)
        for x in (query, key, value)
    )  # [n h, L, d]
    seen = inside if visible is None else torch.zeros_like(inside).index_put((rows, columns), visible.to(torch.bool))
    seen = seen[:, None, :].expand(-1, longest, -1)
    if window is not None:
        places = torch.arange(longest, device=device)
        seen = seen & ((places - places[:, None]).abs() <= window)
    scores = torch.bmm(q * (size**-0.5 if scaling is None else scaling), k.transpose(1, 2))
    # Finite, so that a query that sees nothing has shares, too.
    hidden = torch.zeros(seen.shape, dtype=scores.dtype, device=device)
    hidden.masked_fill_(~seen, torch.finfo(scores.dtype).min / 2)
    scores = scores.view(len(lengths), heads, longest, longest) + hidden[:, None]
    shares = drop(torch.softmax(scores, -1).view(-1, longest, longest), dropout)
    found = torch.bmm(shares, v).view(len(lengths), heads, longest, size).transpose(1, 2)
    return found[rows, columns]
