"""The text of a job script: slurm/pretrain.sbatch or slurm/sweep.sbatch with what a job asks for in its place."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from dsbert.base.errors import UserError
from dsbert.cluster.launcher import module_command
from dsbert.config.recipe import Recipe

_FOLDER = Path(__file__).parents[1] / "slurm"
_DIRECTIVE = "#SBATCH "
_SETTINGS, _END = "# --- settings ---", "# --- end of settings ---"
_RECIPE_END = "END_OF_RECIPE"


def template_directives(tasks: int) -> dict[str, str | None]:
    """SLURM's options as the template has them, for a sweep of so many tasks or, with 0, for one job."""
    lines = [line.removeprefix(_DIRECTIVE + "--") for line in _head(tasks).splitlines() if line.startswith(_DIRECTIVE)]
    parts = [line.partition("=") for line in lines]
    return {key: value if equals else None for key, equals, value in parts}


def render(
    recipes: Sequence[Recipe],
    run_dir: Path,
    directives: Mapping[str, str | None],
    *,
    sweep: bool = False,
    setup: Sequence[str] = (),
    launch_prefix: Sequence[str] = (),
    srun_args: Sequence[str] = (),
    spare_nodes: int = 0,
    options: Sequence[str] = (),
    task_dirs: Sequence[Path] = (),
) -> str:
    """The whole script, with job.sh in it.

    recipes: of each array task of a sweep, else one; they are written out, so that a file that is edited while the job
    waits changes nothing. directives: SLURM's options. setup: lines of shell. launch_prefix: words before `dsbert`;
    srun_args: words after `srun`; spare_nodes: how many of the job's nodes ranks leave free at first; options: of
    `dsbert pretrain`. task_dirs: the run directory of each task; by default RUN_DIR-TASK.

    Raises UserError for text that has no place in a script.
    """
    tasks = len(recipes) if sweep else 0
    comments = [line for line in _head(tasks).splitlines() if not line.startswith(_DIRECTIVE)]
    lines = [_DIRECTIVE + _option(key, value) for key, value in directives.items()]
    settings = [
        *(_setup_line(line) for line in setup),
        f"DSBERT=({shlex.join(module_command('dsbert.cli'))})",
        f"LAUNCH_PREFIX=({_join(launch_prefix)})",
        f"SRUN_ARGS=({_join(srun_args)})",
        f"SPARE_NODES={spare_nodes}",
        "OVERRIDES=()",
        f"RUN_DIR={quote(str(run_dir))}",
        f"OPTIONS=({_join(options)})",
        "# The recipe as it was when it was submitted.",
        *(_choice(recipes, task_dirs) if sweep else _frozen(recipes[0])),
    ]
    job_sh = _read("job.sh").removeprefix("#!/usr/bin/env bash\n")
    return "\n".join([*comments, *lines, "", _SETTINGS, *settings, _END, "", job_sh])


def quote(word: str) -> str:
    """For a shell and for sbatch. Raises UserError for what is not printable: a line break inside quotes could begin a
    line with #SBATCH, and a terminal would act on other controls."""
    if not word.isprintable():
        raise UserError(f"expected printable text on one line in a job script, found {word!r}")
    return shlex.quote(word)


def _option(key: str, value: str | None) -> str:
    """Unlike a shell, sbatch takes a backslash for an escape inside single quotes as well."""
    return f"--{key}" if value is None else f"--{key}={quote(value)}".replace("\\", "\\\\")


def _join(words: Sequence[str]) -> str:
    return " ".join(quote(word) for word in words)


def _setup_line(line: str) -> str:
    """A line that fails ends the job, and says which it was."""
    quoted = quote(line)
    return f'eval {quoted} || {{ echo "setup: exit code $?, and the job ends:" {quoted} >&2 && exit 2; }}'


def _frozen(recipe: Recipe) -> list[str]:
    return [f"IFS= read -r -d '' FROZEN <<'{_RECIPE_END}'", *recipe.as_document().splitlines(), _RECIPE_END]


def _choice(recipes: Sequence[Recipe], task_dirs: Sequence[Path]) -> list[str]:
    count = len(recipes)
    complaint = f'"expected an array task of 1 to {count}, found $SLURM_ARRAY_TASK_ID"'
    lines = ["case $SLURM_ARRAY_TASK_ID in"]
    for task, recipe in enumerate(recipes, start=1):
        named = [f"TASK_RUN_DIR={quote(str(task_dirs[task - 1]))}"] if task_dirs else []
        lines += [f"{task})", *named, *_frozen(recipe), ";;"]
    return [*lines, f"*) echo {complaint} >&2 && exit 2 ;;", "esac"]


def _head(tasks: int) -> str:
    return _read(_name(tasks)).partition(_SETTINGS)[0]


def _name(tasks: int) -> str:
    return "sweep.sbatch" if tasks else "pretrain.sbatch"


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
