"""Every launcher that README.md names gives the same run. SLURM has tests of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ENVIRONMENT, SMALL

BIN = Path(sys.executable).parent


def _launcher(name: str) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return {
        "torchrun": [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", port, "-m", "dsbert"],
        "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", port, "--module", "dsbert"],
        "mpiexec": [str(BIN / "mpiexec"), "-n", "2", sys.executable, "-m", "dsbert"],
    }[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "mpiexec",
        pytest.param("torchrun", marks=pytest.mark.exhaustive),
        pytest.param("deepspeed", marks=pytest.mark.exhaustive),
    ],
)
def test_a_launcher_takes_the_same_way(name: str, run: Path, data: Path, tmp_path: Path) -> None:
    command = _launcher(name)
    if not shutil.which(command[0]):
        pytest.skip(f"no {name} beside {sys.executable}")
    environment = ENVIRONMENT | {"PATH": f"{BIN}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    words = ["pretrain", "demo", "--run-dir", str(tmp_path / "run"), f"data.path={data}", *SMALL]
    done = subprocess.run(
        [*command, *words], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    for file in (
        "topology.safetensors",
        "fragments-00000-of-00002.safetensors",
        "fragments-00001-of-00002.safetensors",
    ):
        last = Path("checkpoints") / "step_00000012" / file
        assert (tmp_path / "run" / last).read_bytes() == (run / last).read_bytes(), file
