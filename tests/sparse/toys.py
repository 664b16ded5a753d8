"""A small sparse model with a plain optimizer, and the data to train it on."""

import torch
from torch import nn
from torch.nn import functional

from dsbert.sparse import MaskManager, SparsityConfig, TorchBlockEditor, sparsify_

TOTAL_STEPS = 24
M64 = (1 << 64) - 1


class Toy:
    """Two sparse layers ("0" and "2") that learn to imitate a fixed dense one. Equal arguments give equal weights."""

    def __init__(self, *, seed=3, group=None, **sparsity):
        values = {"modules": ("*",), "sparsity": 0.6, "block_size": 4, "num_updates": 6}
        self.config = SparsityConfig(**values | sparsity)
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
        self.layers = sparsify_(self.model, self.config, seed=seed)
        for layer in self.layers.values():
            layer.reset_parameters()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.editor = TorchBlockEditor(self.optimizer, group)
        self.masks = self.manager(seed=seed, group=group)

    def manager(self, *, seed=3, group=None):
        return MaskManager(
            self.layers, self.config, total_steps=TOTAL_STEPS, editor=self.editor, seed=seed, group=group
        )

    def loss(self, x, y):
        return functional.mse_loss(self.model(x), y)

    def step(self, step, after_backward=lambda: None):
        """Optimizer step `step`, without the mask update. Returns the loss."""
        self.optimizer.zero_grad()
        loss = self.loss(*batch(step))
        loss.backward()
        after_backward()
        self.optimizer.step()
        return loss.item()

    def train(self, start=1, stop=TOTAL_STEPS):
        """Steps start..stop with their mask updates. Returns the updates."""
        updates = []
        for step in range(start, stop + 1):
            self.step(step)
            updates.append(self.masks.maybe_update(step))
        return [update for update in updates if update is not None]


def batch(step, size=12):
    """x [size, 32], y [size, 32] of a step: the same for everyone who asks."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(size, 32, generator=generator)
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) / 6
    return x, x @ weight.t()


def densify(shape, blocks, rows, cols):
    """The dense weight, block by block, differentiable in `blocks`: what the layers are compared to."""
    size = blocks.shape[1]
    dense = torch.zeros(shape, dtype=blocks.dtype)
    for block, row, col in zip(blocks, rows.tolist(), cols.tolist(), strict=True):
        dense[row * size : (row + 1) * size, col * size : (col + 1) * size] = block
    return dense


def dense_autograd(toy, x, y):
    """{layer: gradient [out, in] of the loss with respect to the DENSE weight}, by plain autograd."""
    weights = {}
    for name, layer in toy.layers.items():
        weight = densify(layer.shape, layer.blocks.detach(), layer.rows, layer.cols)
        weights[name] = weight.requires_grad_()
    hidden = functional.linear(x, weights["0"], toy.layers["0"].bias.detach()).tanh()
    functional.mse_loss(functional.linear(hidden, weights["2"], toy.layers["2"].bias.detach()), y).backward()
    return {name: weight.grad for name, weight in weights.items()}


def plain_hash(key, position):
    """A draw's hash in Python's own integers: splitmix64 of stream `word` at index `position`, unsigned."""
    x = (key.word() + (position + 1) * 0x9E3779B97F4A7C15) & M64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
    return x ^ (x >> 31)


def plain_draw(key, eligible, count):
    """Sort all hashes; eligible: a list of bool."""
    positions = [position for position, free in enumerate(eligible) if free]
    return sorted(sorted(positions, key=lambda position: (plain_hash(key, position), position))[:count])
