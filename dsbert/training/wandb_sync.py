"""`dsbert wandb-sync`: send to W&B what it lacks of a run, from the run directory, on a machine that has a network."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsbert.base.errors import UserError
from dsbert.training.follower import passed_on
from dsbert.training.wandb_mode import UNREACHABLE_S, answers, server_url, wandb_mode
from dsbert.training.wandb_run import describe_run, logs_artifacts


@dataclass(frozen=True)
class Synced:
    """What W&B has of a run now. sent: steps that it lacked; last: the newest that it has, 0 for none; notes: what was
    left out."""

    run: str
    id: str
    sent: int
    last: int
    url: str | None
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """In JSON types."""
        return asdict(self)


def assert_online() -> None:
    """Raises UserError where W&B has no key here, or no server that answers."""
    mode, why = wandb_mode()
    if mode != "online":
        found = why or (f"WANDB_MODE={mode}" if "WANDB_MODE" in os.environ else "none")
        raise UserError(
            f"expected a key of W&B's, found {found}: call `wandb login`, or set WANDB_API_KEY (and no WANDB_MODE)"
        )
    if not answers(server_url()):
        raise UserError(
            f"expected an answer of W&B's server, {server_url()}, within {UNREACHABLE_S:g} s, found none: call this "
            "where there is a network, or set WANDB_BASE_URL"
        )


def sync_run(run_dir: Path, timeout_s: float) -> Synced:
    """Send what W&B lacks: steps, pictures of mask updates, configuration, and checkpoints where the recipe says so.

    What is there stays as it was told, so that a second call sends nothing, and one that was interrupted goes on. Files
    of offline starts are not read: metrics.jsonl has it all. Raises UserError if there is no run, another process sends
    it, W&B refuses, or it takes more than `timeout_s` seconds.
    """
    try:
        run, artifacts = describe_run(run_dir), logs_artifacts(run_dir)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"expected a run in {run_dir} that has begun, found no config.yaml: {why}") from None
    options = {"run_dir": str(run_dir), "run": run, "mode": "online", "patient": False, "artifacts": artifacts}
    try:
        done = passed_on("dsbert.training.wandb_process", options, timeout_s)
    except TimeoutError:
        raise UserError(
            f"expected W&B to take {run_dir} within {timeout_s:g} s, found it still at work: the same command goes on "
            "where it is; --timeout allows more"
        ) from None
    except RuntimeError as error:
        if str(error).startswith("BlockingIOError"):
            raise UserError(
                f"expected nobody else to send {run_dir}, found a process that does: the run is online by itself"
            ) from None
        raise UserError(f"expected W&B to take {run_dir}, found: {error}") from None
    return Synced(str(run_dir), run["id"], done["sent"], done["last"], done.get("url"), done["notes"])
