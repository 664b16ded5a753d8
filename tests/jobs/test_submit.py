"""`dsbert submit` and its scripts without a SLURM: what a script holds, how a shell reads it, and what it decides."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsbert.cluster.launcher import module_command
from dsbert.config.recipe import Recipe, load_recipe
from dsbert.config.recipe_files import RECIPES
from dsbert.engine.ds_config import load_ds_config
from dsbert.jobs.submit import _seconds
from tests.commands import Done, complaint, dsbert

SLURM = Path(__file__).parents[2] / "slurm"
SCRIPTS = sorted(SLURM.glob("*.sbatch"))
SHELLCHECK = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
BASIC = ("submit", "demo", "--nodes", "2", "--time", "24:00:00", "--dry-run")
RUNNING = "JobId=7 JobState=RUNNING Reason=None Requeue=1 Restarts=0 BatchFlag=1"
# What a frozen recipe says of the demo's DeepSpeed configuration.
DEMO_JSON = ("deepspeed.config={zero_optimization: {stage: 1}, gradient_clipping: 1.0}",)
HOSTILE = [
    "data.path=it's here",
    'data.path=a "$(touch pwned)" `touch pwned` ${HOME} \\ !! * ? [a] ; rm -rf x & # no comment',
    'name="#SBATCH --nodes=99"',
    "name=ünïcode ☃",
    "data.path=-n",
]


def script(*words: str) -> str:
    done = dsbert(*BASIC, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def directives(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH ")]
    return {line.partition("=")[0]: line.partition("=")[2] for line in lines}


def late_directives(text: str) -> list[str]:
    """#SBATCH lines that sbatch silently ignores, for a command stands above them."""
    late, commands = [], False
    for line in text.splitlines():
        if line.startswith("#SBATCH"):
            late += [line] if commands else []
        elif line.strip() and not line.lstrip().startswith("#"):
            commands = True
    return late


def shellcheck(text: str) -> None:
    assert SHELLCHECK, "expected shellcheck: pip install -r requirements-dev.txt"
    # SC2016 is about a $ in single quotes, which is just what quoting is for.
    command = [SHELLCHECK, "--exclude=SC2016", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def run_script(
    text: str, folder: Path, srun: str = "", record: str = "", resolved: str = "", books: str = "", **environment: str
) -> Done:
    """Run a script where srun, scontrol and getent are shell programs: each srun's words come back on standard error.

    srun: what the step does; record: what `scontrol show job` says; resolved: the address that the node's name stands
    for; books: the one that SLURM has of it.
    """
    fake = folder / "fake"
    fake.mkdir()
    programs = {
        "srun": f'printf "%s\\0" "$@" >&2; printf "\\n" >&2\n{srun}',
        "getent": f'[ "$2" = n1 ] && set -- - "{resolved}"; [ "$2" ] && echo "$2 STREAM"',
        "scontrol": f"""case "$*" in
            "show hostnames"*) echo "$3" | tr , "\\n" ;;
            "show node"*) echo " NodeAddr={books} Port=1" ;;
            *"show job"*) echo "{record}" ;;
            *) echo "scontrol $*" && kill -TERM $PPID ;; # as SLURM does when it requeues
        esac""",
    }
    for name, program in programs.items():
        (fake / name).write_text(f"#!/bin/sh\n{program}\n")
        (fake / name).chmod(0o755)
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "BACK_OFF_S": "0", **environment}
    done = subprocess.run(
        ["bash"], input=text, cwd=folder, env={"PATH": f"{fake}:/usr/bin:/bin", **variables}, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    shutil.rmtree(fake)
    return Done(done.returncode, done.stdout, done.stderr)


def frozen_recipe(seen: list[str]) -> Recipe:
    """What the ranks would read."""
    return load_recipe(seen[seen.index("pretrain") + 1])


def status(
    outcome: str, job: str = "7", restart: int = 0, start: int = 0, host: str = "", own: int | None = None
) -> str:
    """A shell command that leaves a status.json. host: of the rank at fault, which left with `own`."""
    culprit = {"rank": 1, "host": host, "step": 5, "phase": "train", "code": own} if host else None
    known = {"attempt": 1, "job_id": job, "restart_count": restart, "start": start, "outcome": outcome}
    text = json.dumps(known | {"culprit": culprit})
    return f"mkdir -p r && echo '{text}' >r/status.json; "


def words_of_srun(done: Done) -> list[str]:
    assert "restart 0: starts on n1 from none" in done.stdout, done.stderr
    return done.stderr.removesuffix("\0\n").split("\0")


@pytest.mark.parametrize("path", [*SCRIPTS, SLURM / "job.sh"], ids=lambda path: path.name)
def test_a_script_is_clean_as_it_stands(path: Path) -> None:
    assert SHELLCHECK, "expected shellcheck: pip install -r requirements-dev.txt"
    done = subprocess.run(
        [SHELLCHECK, "--external-sources", str(path)], cwd=SLURM.parent, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert not late_directives(path.read_text())


def test_there_are_three_scripts() -> None:
    assert [path.name for path in SCRIPTS] == ["prepare.sbatch", "pretrain.sbatch", "sweep.sbatch"]


def test_a_directive_behind_a_command_is_found() -> None:
    good = script()
    assert not late_directives(good)
    assert late_directives(good + "\n#SBATCH --mem=1G\n") == ["#SBATCH --mem=1G"]
    assert late_directives("#!/bin/sh\n  set -e\n#SBATCH -N2\n") == ["#SBATCH -N2"]


def test_options_reach_the_script(tmp_path: Path) -> None:
    text = script(
        "--partition", "gpu", "--account", "physics", "--qos", "long", "--gpus-per-node", "a100:8", "--cpus-per-task",
        "6", "--job-name", "two words", "--signal-lead", "600", "--sbatch", "--mem=64G", "--sbatch", "--exclusive",
        "--setup", "export GREETING=hello", "--timeout", "120", "--run-dir", str(tmp_path / "r"),
    )  # fmt: skip
    assert directives(text) == {
        "job-name": "'two words'", "nodes": "2", "ntasks-per-node": "8", "time": "24:00:00", "output": "%x-%j.log",
        "open-mode": "append", "requeue": "", "signal": "B:USR2@600", "chdir": str(Path.cwd()), "partition": "gpu",
        "account": "physics", "qos": "long", "gpus-per-node": "a100:8", "cpus-per-task": "6", "mem": "64G",
        "exclusive": "",
    }  # fmt: skip
    shellcheck(text)
    seen = words_of_srun(run_script(text, tmp_path))
    assert seen[-2:] == ["--timeout", "120"]
    assert "export GREETING=hello" in text


def test_defaults() -> None:
    found = directives(script())
    assert (found["ntasks-per-node"], found["signal"], found["job-name"]) == ("1", "B:USR2@300", "demo")
    found = directives(script("--time", "4", "--gpus-per-node", "4", "--ntasks-per-node", "2"))
    assert (found["ntasks-per-node"], found["signal"]) == ("2", "B:USR2@60"), "a quarter of four minutes"


def test_a_shell_reads_hostile_values_as_they_are(tmp_path: Path) -> None:
    run_dir = tmp_path / "run 'dir' $(touch pwned)"
    text = script(*HOSTILE, "--run-dir", str(run_dir))
    assert not late_directives(text)
    shellcheck(text)
    seen = words_of_srun(run_script(text, tmp_path))
    start = seen.index("pretrain")
    assert seen[start - 3 : start] == module_command("dsbert.cli")
    assert seen[start + 1 :] == [str(run_dir / "recipe-7.yaml"), "--run-dir", str(run_dir)]
    assert frozen_recipe(seen) == load_recipe("demo", [*HOSTILE, f"data.path={Path.cwd() / '-n'}", *DEMO_JSON])
    assert not list(tmp_path.rglob("pwned"))


def test_a_sweep_has_a_line_and_a_run_directory_per_task(tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("seed=2 optim.dense_lr=1e-3\n\n# the last one\nseed=3 'data.path=a b'  # with a blank\n")
    text = script("batch.global_batch=64", "--sweep", str(lines), "--array", "1-2%1", "--run-dir", str(tmp_path / "s"))
    assert directives(text)["array"] == "1-2%1"
    assert directives(script("--sweep", str(lines)))["array"] == "1-2"
    shellcheck(text)
    assert not late_directives(text)
    done = run_script(text, tmp_path, SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="2")
    seen = words_of_srun(done)
    assert seen[-2:] == ["--run-dir", str(tmp_path / "s-2")]
    changes = ("batch.global_batch=64", "seed=3", f"data.path={Path.cwd() / 'a b'}")
    assert frozen_recipe(seen) == load_recipe("demo", [*changes, "log.wandb_group=s", *DEMO_JSON])
    assert '"wandb_group": "mine"' in script("log.wandb_group=mine", "--sweep", str(lines))


@pytest.mark.parametrize(
    ("srun", "record", "code", "said", "requeued"),
    [
        (status("done") + "exit 0", RUNNING, 0, "done", False),
        ("exit 1", RUNNING, 1, "internal error", False),
        ("exit 2", RUNNING, 2, "refused", False),
        ("exit 4", RUNNING, 4, "no valid checkpoint", False),
        ("exit 130", RUNNING, 130, "interrupted", False),
        ("exit 75", RUNNING, 75, "saved", True),
        ("exit 3", RUNNING, 75, "a node failed, exit code 3", True),
        ("exit 74", RUNNING, 75, "a file system is full or fails, exit code 74", True),
        ("exit 137", RUNNING, 75, "a node failed, exit code 137", True),
        ("exit 143", RUNNING, 75, "a node failed, exit code 143", True),
        ("kill -11 $$", RUNNING, 75, "a node failed, exit code 139", True),
        # What the ranks have recorded counts more than what srun says, if it is of this very start.
        ("exit 0", RUNNING, 75, "a node failed, exit code 0", True),
        (status("failed") + "exit 0", RUNNING, 75, "a node failed, exit code 0", True),
        (status("done") + "exit 137", RUNNING, 0, "done", False),
        (status("requeue") + "exit 143", RUNNING, 75, "saved", True),
        (status("requeue", job="77") + "exit 2", RUNNING, 2, "refused", False),
        (status("requeue", restart=1) + "exit 2", RUNNING, 2, "refused", False),
        (status("failed") + "exit 2", RUNNING, 2, "refused", False),
        # One rank's mistake, which the others' code hides.
        (status("failed", host="n1", own=2) + "exit 3", RUNNING, 2, "refused", False),
        (status("failed", host="n1", own=4) + "exit 3", RUNNING, 4, "no valid checkpoint", False),
        (status("failed", host="n1", own=1) + "exit 3", RUNNING, 75, "a node failed, exit code 3", True),
        # scancel: a requeue would bring a job back that somebody has ended.
        ("exit 75", RUNNING.replace("RUNNING", "COMPLETING"), 143, "COMPLETING: left to SLURM", False),
        ("exit 75", RUNNING.replace("RUNNING", "PENDING"), 143, "PENDING: left to SLURM", False),
        ("exit 75", RUNNING.replace("RUNNING Reason=None", "COMPLETING Reason=TimeLimit"), 75, "saved", True),
        # This shell is a left-over on a node that SLURM has lost: a requeue would end the job's next start.
        ("exit 3", RUNNING.replace("Restarts=0", "Restarts=1"), 143, "requeued the job already", False),
        ("exit 75", "", 75, "saved", True),
    ],
)  # fmt: skip
def test_what_a_script_decides(srun: str, record: str, code: int, said: str, requeued: bool, tmp_path: Path) -> None:
    done = run_script(script("--run-dir", str(tmp_path / "r")), tmp_path, srun, record)
    verdict = [line for line in done.stdout.splitlines() if line.startswith("job 7")][-1]
    assert (done.returncode, said in verdict) == (code, True), done.stdout
    assert ("scontrol requeue 7" in done.stdout) == requeued


@pytest.mark.parametrize(
    ("name", "books", "found"),
    [
        ("10.0.0.5", "10.0.0.6", "10.0.0.5"),
        ("127.0.1.1", "10.0.0.6", "10.0.0.6"),
        ("", "10.0.0.6", "10.0.0.6"),
        ("127.0.1.1", "127.0.0.1", "none"),
    ],
)
def test_where_the_ranks_meet(name: str, books: str, found: str, tmp_path: Path) -> None:
    step = 'echo "MASTER_ADDR=${MASTER_ADDR:-none}"'
    text = script("--run-dir", str(tmp_path / "r"))
    done = run_script(text, tmp_path, step, resolved=name, books=books, MASTER_ADDR="stale")
    assert f"MASTER_ADDR={found}\n" in done.stdout


LIFE_INSIDE = [  # of starts in one allocation, the letters as below; how many there are, and what follows
    ("d", 1, "done"),
    ("xd", 2, "done"),
    ("xxd", 3, "done"),
    ("xxx", 3, "a rank or a node failed, exit code 137: requeued"),
    ("x1x2xd", 6, "done"),
    ("x1x2xxd", 6, "a rank or a node failed, exit code 137: requeued"),
    ("123456789d", 10, "done"),
    ("x123456789abd", 11, "a rank or a node failed, exit code 137: requeued"),
    ("xm", 2, "not requeued: the run was refused, exit code 2"),
    ("xf", 2, "a file system is full or fails, exit code 74: requeued"),
    ("xs", 2, "saved: requeued"),
    ("u", 1, "saved: requeued"),
    ("xn", 2, "a rank or a node failed, exit code 71: requeued"),
    ("xe", 2, "a rank or a node failed, exit code 3: requeued"),
]


@pytest.mark.parametrize(("life", "starts", "said"), LIFE_INSIDE)
def test_ranks_start_again_inside_the_allocation(life: str, starts: int, said: str, tmp_path: Path) -> None:
    """Letters as below; d: done, e: an error of one rank alone,
    m: a user's mistake, f: a full disk, n: srun finds no place for the ranks."""
    ends = {
        "x": "exit 137", "m": "exit 2", "f": "exit 74", "s": "exit 75", "n": 'exit "$SLURM_EXIT_IMMEDIATE"',
        "u": "kill -USR2 $PPID; sleep 0.2; exit 75",
    }  # fmt: skip
    cases = []
    for number, event in enumerate(life):
        step = f"mkdir -p r/checkpoints/step_{number + 1:08d}; exit 137"
        own_error = status("failed", start=number, host="n1", own=1) + "exit 3"
        end = {"d": status("done", start=number), "e": own_error}.get(event) or ends.get(event, step)
        cases.append(f"{number}) {end} ;;")
    srun = f"case $DSBERT_START in {' '.join(cases)} esac"
    done = run_script(script("--run-dir", str(tmp_path / "r")), tmp_path, srun, RUNNING)
    assert done.stderr.count("\0pretrain\0") == starts, done.stdout
    verdict = [line for line in done.stdout.splitlines() if line.startswith("job 7")][-1]
    assert said in verdict
    assert done.stdout.count("starts again inside the allocation, time ") == starts - 1
    assert done.stderr.count("\0--immediate=120\0") == starts - 1, "a first start may wait for its nodes"


@pytest.mark.parametrize(
    ("record", "environment"),
    [
        (f"{RUNNING} EndTime=SOON", {}),
        (f"{RUNNING} PreemptTime=2030-01-01T00:00:00 x", {}),
        (RUNNING, {"MAX_INSIDE": "0"}),
        ("", {}),
    ],
)
def test_where_nothing_starts_again_inside(record: str, environment: dict[str, str], tmp_path: Path) -> None:
    """The time is almost up, the job is being preempted, nobody wants it, SLURM does not answer."""
    soon = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 500))
    text = script("--run-dir", str(tmp_path / "r"))
    done = run_script(text, tmp_path, "exit 137", record.replace("SOON", soon), **environment)
    assert done.stderr.count("\0pretrain\0") == 1
    assert "a rank or a node failed, exit code 137: requeued" in done.stdout


def test_a_long_time_is_left(tmp_path: Path) -> None:
    later = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 700))
    done = run_script(script("--run-dir", str(tmp_path / "r")), tmp_path, "exit 137", f"{RUNNING} EndTime={later} x")
    assert done.stderr.count("\0pretrain\0") == 3


def test_spare_nodes_take_the_place_of_those_that_fail(tmp_path: Path) -> None:
    text = script("--spare-nodes", "1", "--ntasks-per-node", "2", "--run-dir", str(tmp_path / "r"))
    found = directives(text)
    assert (found["nodes"], found["ntasks-per-node"], found["no-kill"]) == ("3", "2", "")
    shellcheck(text)
    nodes = {"SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "n1,n2,n3", "SLURM_NTASKS_PER_NODE": "2"}

    def used(srun: str, record: str = RUNNING) -> list[str]:
        """The nodes of each start, by srun's words, and the last line."""
        shutil.rmtree(tmp_path / "r", ignore_errors=True)
        done = run_script(text, tmp_path, srun, record, **nodes)
        assert done.stderr.count("\0--nodes=2\0--ntasks=4\0--nodelist=") == done.stderr.count("\0pretrain\0")
        return [*re.findall(r"--nodelist=(\S+?)\0", done.stderr), done.stdout.splitlines()[-1]]

    def failing(*hosts: str) -> str:
        lines = [
            f"{number}) mkdir -p r/checkpoints/step_{number:08d}; {status('failed', start=number, host=host)} exit 3 ;;"
            for number, host in enumerate(hosts)
        ]
        return f"case $DSBERT_START in {' '.join(lines)} *) exit 2 ;; esac"

    assert used(failing("n2.site.org", "n1", "n2"))[:-1] == ["n1,n2", "n1,n2", "n1,n2", "n1,n3"]
    # Without a culprit nobody is left out; a status of another start names nobody.
    assert used(f"[ $DSBERT_START = 3 ] && exit 2; {status('failed', host='n2')} exit 3")[:-1] == ["n1,n2"] * 3
    # The first node: where the ranks meet moves with it.
    assert used(failing("n1", "n1"))[:-1] == ["n1,n2", "n1,n2", "n2,n3"]
    # What SLURM has lost is not there any more.
    assert used(failing("n1"), f"{RUNNING} ReqNodeList=(null) NodeList=n1,n3 BatchHost=n1")[1] == "n1,n3"
    *_, last = used(failing("n1", "n1", "n2", "n2"))
    assert last == "scontrol requeue 7", "two of three have failed twice"


def test_restarts_without_progress_are_counted(tmp_path: Path) -> None:
    """A life, event by event (x: a crash, s: a save when preempted, u: one when time is up, a digit: a crash after
    that checkpoint), and what became of each: + requeued, - given up."""
    text = script("--run-dir", str(tmp_path / "r"))

    def fate(life: str) -> str:
        shutil.rmtree(tmp_path / "r", ignore_errors=True)
        found = ""
        for restart, event in enumerate(life):
            save = f"mkdir -p r/checkpoints/step_0000000{event}; " if event.isdigit() else ""
            # Not at the very moment of the signal: bash 5.2 may lose an exit code that comes with a trap.
            ends = {"s": "exit 75", "u": "kill -USR2 $PPID; sleep 0.2; exit 75"}.get(event, "exit 137")
            done = run_script(
                text, tmp_path, save + ends,
                RUNNING.replace("Restarts=0", f"Restarts={restart}"), SLURM_RESTART_COUNT=str(restart or ""),
                MAX_INSIDE="0",
            )  # fmt: skip
            found += "+" if "scontrol requeue" in done.stdout else "-"
            assert ("given up" in done.stdout) == (found[-1] == "-"), done.stdout
        return found

    assert fate("xxxx") == "+++-"
    assert fate("xxx1xxxx") == "+++++++-"
    assert fate("123456") == "++++++"
    assert fate("ssssss") == "++++++"
    assert fate("uuuuu") == "++++-"
    assert fate("xsxsxx") == "+++++-"


def test_a_new_job_on_an_old_run_counts_anew(tmp_path: Path) -> None:
    text = script("--run-dir", str(tmp_path / "r"))
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "slurm-restarts").write_text("6 none 3 0\n")
    done = run_script(text, tmp_path, "exit 137", RUNNING.replace("Restarts=0", "Restarts=1"), SLURM_RESTART_COUNT="1")
    assert "scontrol requeue" in done.stdout


def test_json_and_nothing_is_written(tmp_path: Path) -> None:
    done = dsbert(*BASIC, "--json", "--run-dir", str(tmp_path / "r"))
    found = json.loads(done.stdout)
    assert (found["job_id"], found["script"], found["run_dir"]) == (None, None, str(tmp_path / "r"))
    assert found["text"] == script("--run-dir", str(tmp_path / "r"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nosuch.key=1"], "nosuch"),
        (["optim.total_steps=many"], "many"),
        (["deepspeed.config=nosuch"], "nosuch"),
        (["--time", "soon"], "soon"),
        (
            ["--ntasks-per-node", "17"],
            "each of 34 ranks, found 32: start at most 32 ranks, or give batch.global_batch=34",
        ),
        (["--time", "10", "--signal-lead", "400"], "half of --time"),
        (["--array", "1-3"], "--sweep"),
        (["--gpus-per-node", "h100"], "such as 8 or h100:8 with --gpus-per-node, found 'h100'"),
        (["--gpus-per-node", "h100:0"], "h100:0"),
        (["--sbatch", "--gpus-per-node=all"], "found 'all'"),
        (["--sbatch", "--ntasks=4"], "ntasks"),
        (["--sbatch", "--ntasks-per-node=two"], "found 'two'"),
        (["--time", "-5"], "found '-5'"),
        (["--time", "1:2:3:4"], "found '1:2:3:4'"),
        (["--launch-prefix", "apptainer 'exec"], "--launch-prefix"),
        (["--srun-args", "--mpi=pmix --wait=3"], "--wait=3"),
        (["--srun-args", "-K1"], "-K1"),
        (["--sweep", "no/such/file"], "no/such/file"),
        (["--sbatch", "mem=4G"], "mem=4G"),
        (["--sbatch", "--signal=USR1@3"], "signal"),
        (["name=two\nlines"], r"two\nlines"),
        (["--setup", "a\nb"], r"a\nb"),
        (["--account", "a\n#SBATCH --nodes=9"], "nodes=9"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], said: str) -> None:
    assert said in complaint(dsbert(*BASIC, *words))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("1-7", "1 to 3, one per line of the sweep, found --array 1-7"), ("0-2", "1 to 3"), ("4", "1 to 3"),
        ("3-1", "1 to 3"), ("1-3%", "such as 1-8"), ("1;2", "such as 1-8"), ("1-3:0", "such as 1-8"), ("", "such as"),
    ],
)  # fmt: skip
def test_array_tasks_have_lines(asked: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("seed=2\nseed=3\nseed=4\n")
    assert said in complaint(dsbert(*BASIC, "--sweep", str(tmp_path / "lines"), "--array", asked))


@pytest.mark.parametrize("asked", ["1-3", "1,3", "1-3:2%1", "2"])
def test_array_tasks_that_have_lines(asked: str, tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("seed=2\nseed=3\nseed=4\n")
    assert directives(script("--sweep", str(tmp_path / "lines"), "--array", asked))["array"] == shlex.quote(asked)


@pytest.mark.parametrize(
    ("words", "ranks"),
    [
        (["--gpus-per-node", "h100:4"], "4"), (["--gpus-per-node", "a100:2,h100:3"], "5"),
        (["--sbatch", "--gres=gpu:h100:4"], "4"), (["--sbatch", "--gres=gpu:2"], "2"),
        (["--gpus-per-node", "4", "--sbatch", "--ntasks-per-node=2"], "2"),
    ],
)  # fmt: skip
def test_one_rank_per_gpu(words: list[str], ranks: str) -> None:
    assert directives(script(*words))["ntasks-per-node"] == ranks


@pytest.mark.parametrize("text", ["", "# nothing\n", "seed=2 'open\n", "seed=2\nnosuch=1\n"])
def test_a_wrong_sweep_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "lines").write_text(text)
    complaint(dsbert(*BASIC, "--sweep", str(tmp_path / "lines")))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which sbatch answers 41 and squeue, where there is a file `queued`, that the job waits."""
    (tmp_path / "bin").mkdir()
    programs = {"sbatch": "echo '41;cluster'", "squeue": f"[ -e {tmp_path}/queued ] && echo PENDING"}
    for name, program in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def submit(data: Path, *words: str) -> Done:
    small = () if "demo" not in words else (f"data.path={data}",)
    return dsbert("submit", *words, *small, "--nodes", "1", "--time", "60", "--run-dir", "r", "--json")


def test_the_job_id_and_the_script_are_kept(site: Path, data: Path) -> None:
    done = submit(data, "demo")
    found = json.loads(done.stdout)
    assert (found["job_id"], found["script"]) == ("41", str(site / "r.sbatch"))
    assert Path(found["script"]).read_text() == found["text"]
    (record,) = [json.loads(line) for line in (site / "r" / "jobs.jsonl").read_text().splitlines()]
    assert (record["job_id"], record["script"]) == ("41", found["script"])


def test_what_sbatch_complains_of_is_one_line(site: Path, data: Path) -> None:
    (site / "bin" / "sbatch").write_text("#!/bin/sh\necho 'error: invalid partition' >&2; exit 1\n")
    assert "invalid partition" in complaint(submit(data, "demo"))
    assert not list(site.glob("*.sbatch")), "no script of a job that there is not"


def test_no_sbatch_is_one_line(site: Path, data: Path) -> None:
    (site / "bin" / "sbatch").unlink()
    assert "--dry-run" in complaint(submit(data, "demo"))


def test_a_run_has_one_job_at_a_time(site: Path, data: Path) -> None:
    first = json.loads(submit(data, "demo").stdout)
    (site / "queued").touch()
    assert f"the run in {site}/r, found job 41 queued" in complaint(submit(data, "demo"))
    assert "expected seed = 1 as in the run in" in complaint(submit(data, "demo", "seed=2", "--after"))
    assert "without '?'" in complaint(submit(data, "demo", "--after", "--dependency", "afterok:3?afterok:4"))
    second = json.loads(submit(data, "demo", "log.every_steps=5", "--after", "--dependency", "afterok:3").stdout)
    assert directives(second["text"])["dependency"] == "afterok:3,afterany:41"
    assert Path(first["script"]).read_text() == first["text"]
    assert second["script"] == str(site / "r.2.sbatch")
    (site / "queued").unlink()
    assert submit(data, "demo", "seed=2").returncode == 0, "nothing was trained, and nobody is there"


def test_files_that_are_edited_later_change_nothing(site: Path, data: Path) -> None:
    shutil.copy(RECIPES / "demo.yaml", site / "mine.yaml")
    (site / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    (site / "lines").write_text("model.hidden_size=64\nseed=4\n")
    words = ("mine.yaml", "deepspeed.config=zero.json", "data.path=d", "data.stage_to=s", "--sweep", "lines")
    (site / "d").symlink_to(data)
    done = submit(data, *words)
    assert done.returncode == 0, done.stderr
    for name in ("mine.yaml", "zero.json", "lines"):
        (site / name).write_text("{")
    text = json.loads(done.stdout)["text"]
    for task, (width, seed) in {"1": (64, 1), "2": (128, 4)}.items():
        ran = run_script(text, site, SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID=task, SLURM_JOB_ID="7")
        recipe = frozen_recipe(words_of_srun(ran))
        assert (recipe.model.hidden_size, recipe.model.num_heads, recipe.seed) == (width, width // 64, seed)
        assert (recipe.data.path, recipe.data.stage_to) == (site / "d", site / "s")
        assert load_ds_config(recipe, 1, 1)["zero_optimization"] == {"stage": 2}


def test_what_the_nodes_would_refuse_is_refused_at_once(site: Path, data: Path, run: Path) -> None:
    def said(*words: str) -> str:
        return complaint(dsbert("submit", "demo", *words, "--nodes", "1", "--time", "60"))

    here = f"data.path={data}"
    assert f"no prepared data in {site}/none" in said("data.path=none")
    assert "afterok" not in said("data.path=lines")
    damaged = site / "damaged"
    shutil.copytree(data, damaged)
    shard = next(damaged.glob("train-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"bytes in {shard}, found" in said(f"data.path={damaged}")
    assert "expected a block size that divides" in said(here, "sparsity.block_size=128", "model.hidden_size=64")
    assert f"as in the run in {run}, found" in said(here, "--run-dir", str(run))
    (site / "file").touch()
    assert f"found the file {site}/file" in said(here, "--run-dir", "file/r")
    assert "found no % in the folder" not in said(here, "--sbatch", "--output=%j/log")
    assert not list(site.glob("**/*.sbatch"))
    late = dsbert("submit", "demo", "data.path=none", "--nodes", "1", "--time", "60", "--dependency", "afterok:3")
    assert late.returncode == 0, "the data is another job's to make"


def test_a_log_has_a_folder(site: Path, data: Path) -> None:
    assert submit(data, "demo", "--job-name", "a/b", "--sbatch", "--error=logs/%x/%j.err").returncode == 0
    assert (site / "a").is_dir(), "of the default, %x-%j.log"
    assert (site / "logs" / "a" / "b").is_dir()


def test_setup_prefix_and_srun_options_are_used(tmp_path: Path) -> None:
    words = ("--run-dir", str(tmp_path / "r"), "--setup", "export GREETING='good day'")
    step = 'echo "GREETING=$GREETING"'
    text = script(
        *words, "--launch-prefix", "env 'A=b c'", "--srun-args", "--mpi=pmix", "--srun-args", "--cpu-bind 'x y'"
    )
    shellcheck(text)
    done = run_script(text, tmp_path, step)
    assert "GREETING=good day\n" in done.stdout
    seen = words_of_srun(done)
    assert seen[2:] == [
        "--mpi=pmix", "--cpu-bind", "x y", "env", "A=b c", *module_command("dsbert.cli"), "pretrain",
        str(tmp_path / "r" / "recipe-7.yaml"), "--run-dir", str(tmp_path / "r"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--setup", "true", "--setup", "module load 'no such'"], "and the job ends: module load 'no such'\n"),
        (["--setup", "if then"], "the job ends: if then\n"),
        (["--setup", "false || (exit 7)"], "exit code 7, and"),
        (["--launch-prefix", "apptainer exec image.sif"], "expected apptainer on the PATH of "),
    ],
)
def test_what_the_node_lacks_ends_the_job_before_a_rank_starts(words: list[str], said: str, tmp_path: Path) -> None:
    text = script("--run-dir", str(tmp_path / "r"), *words)
    shellcheck(text)
    done = run_script(text, tmp_path, "touch started", RUNNING)
    assert done.returncode == 2
    assert said in done.stdout + done.stderr
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("name", ["pretrain.sbatch", "sweep.sbatch", "prepare.sbatch"])
def test_a_script_as_it_stands_names_a_program_that_is_missing(name: str, tmp_path: Path) -> None:
    text = (SLURM / name).read_text()
    variables = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "SLURM_SUBMIT_DIR": str(SLURM.parent)}
    done = run_script(text, tmp_path, "touch started", RUNNING, **variables)
    assert (done.returncode, (done.stdout + done.stderr).count("\n")) == (2, 1), done
    assert "expected dsbert on the PATH of" in done.stdout + done.stderr
    if name != "prepare.sbatch":
        done = run_script(text, tmp_path, "touch started", RUNNING, **variables | {"SLURM_SUBMIT_DIR": str(tmp_path)})
        assert (done.returncode, "submit from the top of a checkout" in done.stderr) == (2, True)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400), ("90:30", 5430), ("1:30:00", 5400), ("2-12", 216000), ("2-12:30", 217800), ("1-0:0:5", 86405),
        ("UNLIMITED", float("inf")), ("0", float("inf")),
    ],
)  # fmt: skip
def test_slurms_formats_of_time(text: str, seconds: float) -> None:
    assert _seconds(text) == seconds
