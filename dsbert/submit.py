"""`dsbert submit`: fill in slurm/pretrain.sbatch or slurm/sweep.sbatch, and hand it to sbatch.

What comes out is one complete script, to be kept and edited: job.sh, which both source, is written into it.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsbert.config import load_recipe
from dsbert.ds_config import load_ds_config
from dsbert.errors import UserError
from dsbert.launch import module_command

_PACKAGE = Path(__file__).parent
# In a checkout the scripts lie beside the package; a wheel carries them inside it (setup.py).
_FOLDERS = (_PACKAGE.parent / "slurm", _PACKAGE / "slurm")
_SOURCE = 'source "${SLURM_SUBMIT_DIR:-.}/slurm/job.sh"'
_DIRECTIVE = "#SBATCH "
_SETTINGS, _END = "# --- settings ---", "# --- end of settings ---"
# What the scripts rely on, or what has an option of its own.
_OWNED = {"array", "chdir", "nodes", "no-requeue", "open-mode", "requeue", "signal", "time", "wrap"}
_SBATCH_TIMEOUT_S = 120.0


@dataclasses.dataclass(frozen=True)
class Job:
    """What is asked for. sbatch: SLURM's options by name, without dashes; further: more of them, as `--name=value`.

    overrides: of every task. sweep: a file with one line of overrides per array task. signal_lead: seconds before
    the time limit at which the ranks are told to save; by default 300, or a quarter of the limit where that is less.
    setup: lines of shell that come before everything else on the first node.
    """

    recipe: str
    overrides: tuple[str, ...]
    run_dir: Path | None
    sbatch: dict[str, str]
    further: tuple[str, ...] = ()
    sweep: Path | None = None
    signal_lead: int | None = None
    setup: tuple[str, ...] = ()
    timeout: float | None = None


def job_from_options(recipe: str, overrides: tuple[str, ...], options: dict[str, Any]) -> Job:
    """The command line's options by their Python names; what is no field of `Job` is an option of sbatch."""
    names = {field.name for field in dataclasses.fields(Job)}
    sbatch = {key: value for key, value in options.items() if key not in names and value is not None}
    return Job(
        recipe,
        overrides,
        sbatch={key.replace("_", "-"): str(value) for key, value in sbatch.items()},
        **{key: value for key, value in options.items() if key in names},
    )


def submit(job: Job, *, dry_run: bool = False) -> dict[str, Any]:
    """Render and submit: {"job_id", "script": its path, "run_dir", "text": the script}; the first two None if dry_run.

    The script is written beside the run directory, as RUN_DIR.sbatch.

    Raises UserError for a recipe, an override or an option that does not fit, or what sbatch complained of.
    """
    text, run_dir = render(job)
    if dry_run:
        return {"job_id": None, "script": None, "run_dir": str(run_dir), "text": text}
    path = run_dir.with_name(run_dir.name + ".sbatch")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"expected to write {path}, found: {error.strerror}") from None
    return {"job_id": _sbatch(path), "script": str(path), "run_dir": str(run_dir), "text": text}


def render(job: Job) -> tuple[str, Path]:
    """The script, and the run directory: that of array task N has -N behind its name. Raises UserError."""
    sweep = _read_sweep(job.sweep) if job.sweep else []
    if "array" in job.sbatch and not sweep:
        raise UserError("expected --sweep FILE with --array, found none: give one line of overrides per array task")
    recipes = [load_recipe(job.recipe, (*job.overrides, *words)) for words in sweep or [[]]]
    for recipe in recipes:
        load_ds_config(recipe, 1, 1)
        recipe.batch.on_ranks(_num_ranks(job))
    run_dir = (job.run_dir or Path("runs") / recipes[0].name).absolute()
    template = _read("sweep.sbatch" if sweep else "pretrain.sbatch")
    head, _, rest = template.partition(_SETTINGS)
    directives = _directives(job, head, recipes[0].name, len(sweep))
    comments = [line for line in head.splitlines() if not line.startswith(_DIRECTIVE)]
    _, _, tail = rest.partition(_END)
    job_sh = _read("job.sh").removeprefix("#!/usr/bin/env bash\n")
    tail = re.sub(r"# shellcheck source=.*\n", "", tail).replace(_SOURCE, job_sh.rstrip("\n"))
    parts = [*comments, *directives, "", _SETTINGS, *_settings(job, run_dir, sweep), _END]
    return "\n".join(parts) + tail, run_dir


def _settings(job: Job, run_dir: Path, sweep: Sequence[Sequence[str]]) -> list[str]:
    options = [] if job.timeout is None else ["--timeout", f"{job.timeout:g}"]
    lines = [
        *(_printable(line) for line in job.setup),
        f"DSBERT=({shlex.join(module_command('dsbert.cli'))})",
        f"RECIPE={_quote(job.recipe)}",
        f"OVERRIDES=({_join(job.overrides)})",
        f"RUN_DIR={_quote(str(run_dir))}",
        f"OPTIONS=({_join(options)})",
    ]
    if sweep:
        count = len(sweep)
        complaint = f'"expected an array task of 1 to {count}, found $SLURM_ARRAY_TASK_ID"'
        lines += [
            "case $SLURM_ARRAY_TASK_ID in",
            *(f"{task}) OVERRIDES+=({_join(words)}) ;;" for task, words in enumerate(sweep, start=1)),
            f"*) echo {complaint} >&2 && exit 2 ;;",
            "esac",
        ]
    return lines


def _directives(job: Job, head: str, name: str, tasks: int) -> list[str]:
    """The template's #SBATCH lines with what the job asks for in their place, and the rest of it behind them."""
    lines = [line.removeprefix(_DIRECTIVE + "--") for line in head.splitlines() if line.startswith(_DIRECTIVE)]
    options: dict[str, str | None] = {}
    for line in lines:
        key, equals, value = line.partition("=")
        options[key] = value if equals else None
    options |= {"job-name": name, "chdir": str(Path.cwd())}
    if tasks:
        options["array"] = f"1-{tasks}"
    options |= job.sbatch
    if ranks := _ranks_per_node(job):
        options["ntasks-per-node"] = ranks
    options["signal"] = f"B:USR2@{_signal_lead(job)}"
    for option in job.further:
        if not re.match(r"--[a-z][a-z-]*(=|$)", option):
            raise UserError(f"expected an option of sbatch such as --mem=64G with --sbatch, found {option!r}")
        key, equals, value = option.removeprefix("--").partition("=")
        if key in _OWNED:
            raise UserError(f"expected no {key} with --sbatch, found it: dsbert sets it, or has an option for it")
        options[key] = value if equals else None
    return [f"{_DIRECTIVE}--{key}" + ("" if value is None else f"={_quote(value)}") for key, value in options.items()]


def _num_ranks(job: Job) -> int:
    return int(job.sbatch["nodes"]) * int(_ranks_per_node(job) or 1)


def _ranks_per_node(job: Job) -> str:
    """As asked for, or one per GPU; empty: the template's one."""
    return job.sbatch.get("ntasks-per-node") or job.sbatch.get("gpus-per-node", "").rpartition(":")[2]


def _signal_lead(job: Job) -> int:
    limit_s = _seconds(job.sbatch["time"])
    lead_s = job.signal_lead
    if lead_s is None:
        return int(min(300, limit_s // 4))
    if lead_s > limit_s / 2:
        raise UserError(
            f"expected --signal-lead of at most half of --time {job.sbatch['time']}, found {lead_s} s: else the job "
            "would hardly train before it saves and is requeued"
        )
    return lead_s


def _seconds(time: str) -> float:
    """SLURM's time formats: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    if time.lower() in ("infinite", "unlimited", "-1"):
        return float("inf")
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not match:
        raise UserError(f"expected a time such as 90, 24:00:00 or 2-12:00:00 with --time, found {time!r}")
    days, *numbers = (int(number) if number else None for number in match.groups())
    first, second, third = numbers
    if days is not None or third is not None:
        return (days or 0) * 86400 + (first or 0) * 3600 + (second or 0) * 60 + (third or 0)
    return (first or 0) * 60 + (second or 0)


def _read_sweep(path: Path) -> list[list[str]]:
    """The overrides of each line, whose words are quoted as in a shell; empty lines and comments do not count."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        sweep = [words for words in (shlex.split(line, comments=True) for line in lines) if words]
    except (OSError, ValueError) as error:
        raise UserError(f"expected lines of overrides in {path}, found: {error}") from None
    if not sweep:
        raise UserError(f"expected a line of overrides per array task in {path}, found none")
    return sweep


def _sbatch(path: Path) -> str:
    command = ["sbatch", "--parsable", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SBATCH_TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise UserError("expected sbatch on the PATH, found none: submit where SLURM is, or use --dry-run") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"expected an answer of sbatch within {_SBATCH_TIMEOUT_S:g} s, found none") from None
    if done.returncode:
        raise UserError(f"expected sbatch to accept {path}, found: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]  # a cluster's name may follow


def _read(name: str) -> str:
    return next(folder / name for folder in _FOLDERS if (folder / name).is_file()).read_text(encoding="utf-8")


def _join(words: Sequence[str]) -> str:
    return " ".join(_quote(word) for word in words)


def _quote(word: str) -> str:
    return shlex.quote(_printable(word))


def _printable(text: str) -> str:
    """A line break inside quotes could begin a line with #SBATCH, and a terminal would act on other controls."""
    if not text.isprintable():
        raise UserError(f"expected printable text on one line in a job script, found {text!r}")
    return text
