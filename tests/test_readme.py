"""The README's example is a program, and its commands are the Makefile's."""

from __future__ import annotations

import ast
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


def test_the_tour_is_whole() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tour = text.split("## Where things are")[1].split("##")[0]
    packages = {path.parent.name for path in (ROOT / "dsbert").glob("*/__init__.py")}
    assert set(re.findall(r"^      ([a-z]+)/", tour, re.MULTILINE)) == packages
    for name in re.findall(r"\b[a-z_]+\.py\b", tour):
        assert list((ROOT / "dsbert").rglob(name)), name
    (tools,) = re.findall(r"tools/\s+((?:.*,\n)*.*)", tour)
    for name in re.split(r",\s+", tools):
        assert (ROOT / "tools" / f"{name}.py").is_file(), name


def test_a_package_says_what_its_modules_are() -> None:
    for init in (ROOT / "dsbert").rglob("__init__.py"):
        modules = {path.stem for path in init.parent.glob("*.py")} - {"__init__", "__main__"}
        said = set(re.findall(r"\w+", ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""))
        if init.parent.name != "dsbert":
            assert modules <= said, f"{init}: {sorted(modules - said)}"
