"""Hand an export over to huggingface_hub, which uploads it: names, tokens and transfers are its business."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dsbert.base.errors import UserError


def check_hub_name(name: str) -> None:
    """Before anything is written. Raises UserError for what can be no repository on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"expected NAME or OWNER/NAME for --push-to-hub, found {name!r}: {_line(error)}") from None


def upload(directory: Path, name: str, files: Iterable[str], message: str, private: bool | None = None) -> str:
    """Upload those files of a directory in one commit, to a repository that is made where there is none, and return
    where they are. private: of a repository that is made; None: as the hub has it. Raises UserError."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="dsbert")
    with _plainly(directory, name):
        repository = api.create_repo(name, private=private, exist_ok=True).repo_id
        operations = [CommitOperationAdd(file, directory / file) for file in sorted(files)]
        commit = api.create_commit(repository, operations, commit_message=message)
    return str(commit.commit_url)


@contextmanager
def _plainly(directory: Path, name: str) -> Iterator[None]:
    """What the hub, the network or the token refuses becomes one line."""
    from huggingface_hub.errors import HTTPError  # of whichever client it uses; its own errors are OSErrors as well

    try:
        yield
    except (HTTPError, OSError) as error:
        raise UserError(
            f"expected the hub to take {directory} as {name}, found {type(error).__name__}: {_line(error)}: the export "
            "itself is there; run `hf auth login`, or give HF_TOKEN, and try again"
        ) from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
