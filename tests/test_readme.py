"""The README's example is a program, and its commands are the Makefile's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_example_runs_without_deepspeed_and_transformers() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    block = "import sys\nfor name in ('deepspeed', 'transformers', 'wandb'):\n    sys.modules[name] = None\n"
    done = subprocess.run([sys.executable, "-c", block + code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([0-9.]+)", done.stdout)]
    assert len(losses) == 9
    assert losses[-1] < losses[0]
    explored = [int(share) for share in re.findall(r"(\d+)% explored", done.stdout)]
    assert explored == sorted(explored)
    assert explored[-1] > explored[0]
    assert "density 0.1" in done.stdout


def test_every_file_of_the_tour_is_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tour = text.split("## Where things are")[1].split("##")[0]
    for name in re.findall(r"\b[a-z_]+\.py\b", tour):
        assert (ROOT / "dsbert" / name).is_file(), name
    (tools,) = re.findall(r"tools/\s+((?:.*,\n)*.*)", tour)
    for name in re.split(r",\s+", tools):
        assert (ROOT / "tools" / f"{name}.py").is_file(), name
