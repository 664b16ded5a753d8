"""dsbert.sparse is a library of its own: plain torch, nothing of what only training needs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import sys

BLOCKED = {"deepspeed", "transformers", "wandb", "datasets", "tokenizers", "mpi4py", "typer"}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())

import torch
from torch import nn
from dsbert.sparse import MaskManager, SparsityConfig, TorchBlockEditor, sparsify_

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
config = SparsityConfig(sparsity=0.75, block_size=8, modules=("*",), num_updates=6)
layers = sparsify_(model, config, seed=1)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
masks = MaskManager(layers, config, total_steps=30, editor=TorchBlockEditor(optimizer), seed=1)
x = torch.randn(64, 32)
y = x.flip(1).tanh()
losses, updates = [], 0
for step in range(1, 31):
    loss = nn.functional.mse_loss(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    updates += masks.maybe_update(step) is not None
    losses.append(loss.item())
assert updates == 5, updates
assert abs(masks.density - 0.25) < 1e-9, masks.density
assert masks.dof > 0.3, masks.dof
assert losses[-1] < 0.7 * losses[0], losses
assert not BLOCKED & {name.partition(".")[0] for name in sys.modules}
print("trained")
"""


@pytest.mark.slow
def test_trains_without_deepspeed_and_transformers():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "trained\n"
