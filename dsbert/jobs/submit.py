"""`dsbert submit`: look at all that can be known now, write a job script (job_script.py), and hand it to sbatch."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsbert.base.errors import UserError
from dsbert.config.recipe import Recipe, load_recipe
from dsbert.jobs.job_queue import TaskRun, assert_ready, hand_over
from dsbert.jobs.job_script import quote, render, template_directives
from dsbert.training.preflight import frozen

# What the scripts rely on, or what has an option of its own.
_OWNED = {"array", "chdir", "nodes", "no-requeue", "ntasks", "open-mode", "requeue", "signal", "time", "wrap"}
_OWNED_BY_SRUN = ("--kill-on-bad-exit", "-K", "--wait", "-W")
_DEVICES = r"(?:[A-Za-z0-9_.-]+:)?([1-9][0-9]*)"


@dataclasses.dataclass(frozen=True)
class Job:
    """What is asked for. sbatch: SLURM's options by name, without dashes; further: more of them, as `--name=value`.

    overrides: of every task. sweep: a file with one line of overrides per array task. signal_lead: seconds before
    the time limit at which the ranks are told to save; by default 300, or a quarter of the limit where that is less.
    setup: lines of shell that come before everything else on the first node. launch_prefix: what to put before
    `dsbert`, as `apptainer exec image.sif`; srun_args: more words for srun. spare_nodes: how many more than the ranks
    use, to take the place of nodes that fail. after: whether to wait for jobs that are on
    the same run.
    """

    recipe: str
    overrides: tuple[str, ...]
    run_dir: Path | None
    sbatch: dict[str, str]
    further: tuple[str, ...] = ()
    sweep: Path | None = None
    signal_lead: int | None = None
    setup: tuple[str, ...] = ()
    launch_prefix: str | None = None
    srun_args: tuple[str, ...] = ()
    after: bool = False
    spare_nodes: int = 0
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

    The script is written beside the run directory, as RUN_DIR.sbatch; one that is there already stays as it is. A dry
    run only says what would be refused of data and run directories, which may be on another machine.

    Raises UserError for a recipe, an override, data or an option that does not fit, or what sbatch complained of.
    """
    sweep = _read_sweep(job.sweep) if job.sweep else []
    if "array" in job.sbatch and not sweep:
        raise UserError("expected --sweep FILE with --array, found none: give one line of overrides per array task")
    for word in job.overrides:
        quote(word)  # a line break in one of them was meant to be two
    recipes = [frozen(load_recipe(job.recipe, (*job.overrides, *words))) for words in sweep or [[]]]
    if sweep:
        recipes = [_grouped(recipe, _run_dir(job, recipes).name) for recipe in recipes]
    return _submit(job, recipes, [], sweep=bool(sweep), dry_run=dry_run)


def submit_recipes(
    job: Job, recipes: Sequence[Recipe], run_dirs: Sequence[Path], *, dry_run: bool = False
) -> dict[str, Any]:
    """An array with a task for each recipe, each in a run directory of its own; else as `submit`, whose recipe,
    overrides and sweep count for nothing here. job.run_dir: what the script is named after."""
    return _submit(job, [frozen(recipe) for recipe in recipes], run_dirs, sweep=True, dry_run=dry_run)


def _submit(
    job: Job, recipes: Sequence[Recipe], task_dirs: Sequence[Path], *, sweep: bool, dry_run: bool
) -> dict[str, Any]:
    run_dir = _run_dir(job, recipes)
    directives = _directives(job, recipes[0].name, len(recipes) if sweep else 0)
    runs = {} if sweep else {run_dir: TaskRun(recipes[0])}
    if sweep:
        for task in _tasks(directives, len(recipes)):
            own = task_dirs[task - 1].absolute() if task_dirs else run_dir.with_name(f"{run_dir.name}-{task}")
            runs[own] = TaskRun(recipes[task - 1], task)
    for run in runs.values():
        run.recipe.batch.on_ranks(_num_ranks(directives))
    directives |= _with_spares(directives, job.spare_nodes)
    doubt = None
    try:
        jobs = assert_ready(runs, after=job.after, data_is_made="dependency" not in directives)
        directives |= _after(jobs, directives)
    except UserError as error:
        if not dry_run:
            raise
        doubt = error
    text = render(
        recipes, run_dir, directives,
        sweep=sweep,
        task_dirs=[path.absolute() for path in task_dirs],
        setup=job.setup,
        launch_prefix=_words(job.launch_prefix or "", "--launch-prefix"),
        srun_args=_srun_words(job.srun_args),
        spare_nodes=job.spare_nodes,
        options=[] if job.timeout is None else ["--timeout", f"{job.timeout:g}"],
    )  # fmt: skip
    if dry_run:
        if doubt:
            print(f"dsbert: from here the job would be refused: {doubt}", file=sys.stderr)
        return {"job_id": None, "script": None, "run_dir": str(run_dir), "text": text}
    _make_log_folders(directives)
    job_id, path = hand_over(text, run_dir, runs)
    return {"job_id": job_id, "script": str(path), "run_dir": str(run_dir), "text": text}


def _run_dir(job: Job, recipes: Sequence[Recipe]) -> Path:
    """Of the job; the tasks of a sweep have theirs beside it."""
    return (job.run_dir or Path("runs") / recipes[0].name).absolute()


def _grouped(recipe: Recipe, name: str) -> Recipe:
    """With the group that W&B shows the tasks of a sweep in, unless the recipe has one."""
    group = recipe.log.wandb_group or name
    return recipe.model_copy(update={"log": recipe.log.model_copy(update={"wandb_group": group})})


def _after(jobs: Sequence[str], directives: Mapping[str, str | None]) -> dict[str, str | None]:
    """The dependency on jobs that are on the same run, beside the one that was asked for."""
    asked = directives.get("dependency")
    if not jobs:
        return {}
    if asked and "?" in asked:
        raise UserError(f"expected a dependency without '?' beside --after, found {asked!r}: name the jobs yourself")
    return {"dependency": ",".join([*([asked] if asked else []), *(f"afterany:{number}" for number in jobs)])}


def _directives(job: Job, name: str, tasks: int) -> dict[str, str | None]:
    """The template's options of sbatch with what the job asks for in their place, and the rest of it behind them."""
    options = template_directives(tasks) | {"job-name": name, "chdir": str(Path.cwd())}
    if tasks:
        options["array"] = f"1-{tasks}"
    options |= job.sbatch
    for option in job.further:
        if not re.match(r"--[a-z][a-z-]*(=|$)", option):
            raise UserError(f"expected an option of sbatch such as --mem=64G with --sbatch, found {option!r}")
        key, equals, value = option.removeprefix("--").partition("=")
        if key in _OWNED:
            raise UserError(f"expected no {key} with --sbatch, found it: dsbert sets it, or has an option for it")
        options[key] = value if equals else None
    named = {option[2:].partition("=")[0] for option in job.further} | job.sbatch.keys()
    if (gpus := _gpus(options)) and "ntasks-per-node" not in named:
        options["ntasks-per-node"] = str(gpus)  # one rank per GPU
    options["signal"] = f"B:USR2@{_signal_lead(job)}"
    return options


def _gpus(options: Mapping[str, str | None]) -> int:
    """How many a node has, 0 where none are asked for."""
    asked = options.get("gpus-per-node")
    if asked is not None:
        counts = [re.fullmatch(_DEVICES, part) for part in asked.split(",")]
        if not all(counts):
            raise UserError(f"expected a number of GPUs such as 8 or h100:8 with --gpus-per-node, found {asked!r}")
        return sum(int(count[1]) for count in counts if count)
    found = re.fullmatch(f"gpu:{_DEVICES}", options.get("gres") or "")
    return int(found[1]) if found else 0


def _num_ranks(options: Mapping[str, str | None]) -> int:
    counts = [options["nodes"] or "", options["ntasks-per-node"] or ""]
    for count in counts:
        if not re.fullmatch("[1-9][0-9]*", count):
            raise UserError(f"expected a number of nodes, and of ranks on each, found {count!r}")
    return int(counts[0]) * int(counts[1])


def _with_spares(options: Mapping[str, str | None], spare_nodes: int) -> dict[str, str | None]:
    """Of a job that keeps the nodes which are left where SLURM loses one, if it has any to spare."""
    return {"nodes": str(int(options["nodes"] or 0) + spare_nodes), "no-kill": None} if spare_nodes else {}


def _tasks(options: Mapping[str, str | None], lines: int) -> list[int]:
    """The array tasks that will run. Raises UserError for one that has no line in the sweep."""
    asked = options["array"] or ""
    spec, percent, limit = asked.partition("%")
    parts = [re.fullmatch(r"([0-9]+)(?:-([0-9]+)(?::([1-9][0-9]*))?)?", part) for part in spec.split(",")]
    if not all(parts) or (percent and not re.fullmatch("[1-9][0-9]*", limit)):
        raise UserError(f"expected array tasks such as 1-8, 1,3 or 1-8%2 with --array, found {asked!r}")
    tasks = set()
    for first, last, step in (part.groups() for part in parts if part):
        if int(last or first) > lines or int(first) < 1 or int(last or first) < int(first):
            raise UserError(f"expected array tasks of 1 to {lines}, one per line of the sweep, found --array {asked}")
        tasks |= set(range(int(first), int(last or first) + 1, int(step or 1)))
    return sorted(tasks)


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
    """SLURM's time formats: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]; 0 is no
    limit."""
    if time.lower() in ("infinite", "unlimited", "-1"):
        return float("inf")
    match = re.fullmatch(r"(?:([0-9]+)-)?([0-9]+)(?::([0-9]+))?(?::([0-9]+))?", time)
    if not match:
        raise UserError(f"expected a time such as 90, 24:00:00 or 2-12:00:00 with --time, found {time!r}")
    days, *numbers = (int(number) if number else None for number in match.groups())
    first, second, third = (number or 0 for number in numbers)
    if days is not None or numbers[2] is not None:
        limit_s = (days or 0) * 86400 + first * 3600 + second * 60 + third
    else:
        limit_s = first * 60 + second
    return limit_s or float("inf")


def _make_log_folders(options: Mapping[str, str | None]) -> None:
    """SLURM makes no folder: a job whose log has none fails at once, and without a word. Raises UserError."""
    chdir = Path(options["chdir"] or ".")
    for key in ("output", "error"):
        text = options.get(key)
        if text is None:
            continue
        folder = (chdir / text.replace("%x", str(options["job-name"]))).parent
        if "%" in str(folder):
            raise UserError(f"expected no % in the folder of --{key}, found {text!r}: SLURM makes no folders")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"expected a folder for the job's log at {folder}, found: {error.strerror}") from None


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


def _words(text: str, option: str) -> list[str]:
    """Quoted as in a shell. Raises UserError."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"expected words quoted as in a shell with {option}, found {text!r}: {error}") from None


def _srun_words(arguments: Sequence[str]) -> list[str]:
    words = [word for argument in arguments for word in _words(argument, "--srun-args")]
    for word in words:
        if word.startswith(_OWNED_BY_SRUN):
            raise UserError(
                f"expected no {word} with --srun-args, found it: the ranks need their time to name a culprit"
            )
    return words
