"""The secret of a launch: who knows it is one of its ranks. Imports nothing slow.

`dsbert pretrain --nproc` draws one for every start and hands it to its ranks in their environment, which other users
cannot read. Under other launchers it stands in a file that only its owner may read, in a directory that all ranks
share; the rank that comes first makes it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dsbert.base.errors import UserError

SECRET_ENV = "DSBERT_SECRET"
SECRET_FILE = "rendezvous.key"
_FEWEST_CHARACTERS = 32
_PATIENCE_S = 5.0  # what another rank may take to write the file, or a network file system to show it


@dataclass(frozen=True)
class Secret:
    """key: b"" where nobody could tell the ranks one: then they meet in the open. directory: where its file is."""

    key: bytes = b""
    directory: Path | None = None

    def derive(self, *words: str) -> bytes:
        """A key for one purpose; none tells anything about another one."""
        return derive(self.key, *words)


def derive(key: bytes, *words: str) -> bytes:
    """32 bytes that follow from the key and all the words, and that nobody can have without the key."""
    message = b"".join(len(word := text.encode()).to_bytes(8, "big") + word for text in words)
    return hmac.new(key, message, hashlib.sha256).digest()


def new_secret() -> str:
    """Fit for SECRET_ENV."""
    return secrets.token_hex(32)


def find_secret(directory: Path | None) -> Secret:
    """What the environment says, else the file in the directory, which is made if need be, with all folders above.

    Raises UserError where the file cannot be had, or others could know it.
    """
    if given := os.environ.get(SECRET_ENV):
        if len(given) < _FEWEST_CHARACTERS:
            raise UserError(
                f"expected at least {_FEWEST_CHARACTERS} characters in {SECRET_ENV}, found {len(given)}: unset it, or "
                "export a longer one"
            )
        return Secret(os.fsencode(given))
    if directory is None:
        return Secret()
    path = directory / SECRET_FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            _make(path)
        return Secret(_read(path), directory)
    except OSError as error:
        raise UserError(f"expected to keep the ranks' secret in {path}, found: {error.strerror}") from None


def _make(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "w", encoding="ascii") as file:
        file.write(new_secret())


def _read(path: Path) -> bytes:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
                raise UserError(
                    f"expected {path}, the ranks' secret, to be a file of user {os.geteuid()} that nobody else may "
                    f"read, found user {found.st_uid} and mode {stat.S_IMODE(found.st_mode):o}: remove it, or export "
                    f"{SECRET_ENV}"
                )
            key = file.read(1024)
        if len(key) >= _FEWEST_CHARACTERS:
            return key
        if time.monotonic() > deadline:
            raise UserError(f"expected the ranks' secret in {path}, found {len(key)} bytes: remove it")
        time.sleep(0.05)
