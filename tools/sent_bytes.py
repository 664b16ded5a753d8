"""Count what this process hands to torch's collectives, by kind."""

from __future__ import annotations

from collections import Counter
from typing import Any

# Which argument is what this rank hands in.
_COLLECTIVES = {
    "all_reduce": 0, "reduce": 0, "broadcast": 0, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1,
    "all_gather": 1, "all_gather_single": 1, "reduce_scatter_single": 1,
}  # fmt: skip
_NAMES = ("tensor", "input_tensor", "input")


def count_sent_bytes() -> Counter[str]:
    """The counter, in bytes by collective, from now on. Before DeepSpeed starts: it looks its collectives up then."""
    import torch
    import torch.distributed as dist

    sent: Counter[str] = Counter()

    def counted(name: str, original: Any, which: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            named = next((kwargs[key] for key in _NAMES if key in kwargs), None)
            tensor = args[which] if len(args) > which else named
            tensors = tensor if isinstance(tensor, list) else [tensor]
            sent[name] += sum(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t))
            return original(*args, **kwargs)

        return call

    for name, which in _COLLECTIVES.items():
        if hasattr(dist, name):
            setattr(dist, name, counted(name, getattr(dist, name), which))
    send = dist.ProcessGroup.send

    def counted_send(group: Any, tensors: Any, *where: Any) -> Any:
        """Every rank sends each row of an exchange once but one: its share is a row."""
        sent["exchange"] += sum(tensor.nbytes for tensor in tensors) / (group.size() - 1)
        return send(group, tensors, *where)

    dist.ProcessGroup.send = counted_send  # type: ignore[assignment]
    return sent
