"""Collect what dsbert needs on a machine that has torch and no network: wheels for its Python, in a folder to carry.

    python tools/carry_wheels.py --to wheels [--python 3.12] [--there FILE] [--also torchao==0.17.0] [--max-mb 60]

That is what training needs, and what that needs in turn, in the versions that are installed here; but for torch, what
was built to fit it, and what --there (the output of `pip freeze` on that machine) lists in a version that will do.
What has no wheel is built, and must come out as pure Python. --list only names them.

There: `python tools/card_suite.py --wheels wheels ...`, or pip install --no-index --no-deps wheels/*.whl.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import cast

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# What a machine for training has, in versions that fit each other: another one of these may break the rest.
KEPT = frozenset(
    {"torch", "triton", "transformers", "tokenizers", "safetensors", "huggingface-hub", "numpy", "pyarrow", "mpi4py"}
)
# Reads data sets of a hub, which there is none of without a network.
NOT_NEEDED = frozenset({"datasets"})
# pip takes a platform literally, and wheels name the oldest that they run on.
_PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux1")


def needed(python: str, there: dict[str, str]) -> dict[str, str]:
    """Name -> version of what is to be carried to a machine with this Python, where `there` is installed.

    Raises PackageNotFoundError if dsbert itself is not installed here.
    """
    here = cast("dict[str, str]", default_environment())
    environment = here | {"python_version": python, "python_full_version": f"{python}.0"}
    found: dict[str, str] = {}
    pending = [(Requirement("dsbert"), metadata.requires("dsbert") or [])]
    while pending:
        parent, requirements = pending.pop()
        for requirement in map(Requirement, requirements):
            name = canonicalize_name(requirement.name)
            if name in KEPT | NOT_NEEDED or name in found or not _applies(requirement, parent.extras, environment):
                continue
            if name in there and requirement.specifier.contains(there[name], prereleases=True):
                continue
            try:
                found[name] = metadata.version(name)
                pending.append((requirement, metadata.requires(name) or []))
            except metadata.PackageNotFoundError:  # of the other Python's alone
                found[name] = ""
    return dict(sorted(found.items()))


def _applies(requirement: Requirement, extras: set[str], environment: dict[str, str]) -> bool:
    """Whether a requirement of a package, installed with these extras, is one in this environment."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate(environment | {"extra": extra}) for extra in extras or {""})


def installed_there(freeze: Path | None) -> dict[str, str]:
    """Name -> version of the lines of `pip freeze`; those that name no version are passed over."""
    if freeze is None:
        return {}
    pairs = (line.partition("==") for line in freeze.read_text(encoding="utf-8").splitlines())
    return {canonicalize_name(name.strip()): version.strip() for name, equals, version in pairs if equals}


def fetch(requirement: str, to: Path, python: str) -> None:
    """One wheel into a folder. Raises CalledProcessError if it can be neither had nor built."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    platforms = [word for name in _PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    wheel = [*pip, "download", "--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    done = subprocess.run([*wheel, *platforms, "--dest", str(to), requirement], capture_output=True, check=False)
    if done.returncode:
        build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(to), requirement]
        subprocess.run(build, env=os.environ | {"DS_BUILD_OPS": "0"}, check=True)


def main(words: list[str] | None = None) -> int:
    """Fetch, and say what it weighs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("wheels"))
    parser.add_argument("--python", default="3.12", help="of that machine")
    parser.add_argument("--there", type=Path, metavar="FILE", help="`pip freeze` of that machine")
    parser.add_argument("--also", action="append", default=[], metavar="NAME==VERSION")
    parser.add_argument("--max-mb", type=float, default=60.0)
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args(words)
    wanted = needed(options.python, installed_there(options.there))
    requirements = [f"{name}=={version}" if version else name for name, version in wanted.items()] + options.also
    if options.list:
        print("\n".join(requirements))
        return 0
    options.to.mkdir(parents=True, exist_ok=True)
    if found := sorted(path.name for path in options.to.iterdir()):
        print(f"carry_wheels: expected an empty folder for --to, found {found[0]} in {options.to}", file=sys.stderr)
        return 2
    for requirement in requirements:
        fetch(requirement, options.to, options.python)
    wheels = sorted(options.to.iterdir())
    here_only = [
        wheel.name for wheel in wheels if not wheel.name.endswith(".whl") or _built_here(wheel, options.python)
    ]
    megabytes = sum(wheel.stat().st_size for wheel in wheels) / 1e6
    print(f"{len(wheels)} wheels, {megabytes:.1f} MB in {options.to}")
    if here_only or megabytes > options.max_mb:
        reason = f"expected wheels that run there, found {here_only[0]}" if here_only else "more than --max-mb"
        print(f"carry_wheels: {reason}", file=sys.stderr)
        return 1
    return 0


def _built_here(wheel: Path, python: str) -> bool:
    """Whether a wheel is made for a Python that is not the other machine's."""
    tag = wheel.stem.split("-")[-3]
    return tag.startswith("cp") and "abi3" not in wheel.stem and tag != f"cp{python.replace('.', '')}"


if __name__ == "__main__":
    sys.exit(main())
