"""Whether W&B is to be online: where it would find its key and its server, read without importing wandb."""

from __future__ import annotations

import netrc
import os
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

_SERVER = "https://api.wandb.ai"
# How long to wait for a server that does not answer.
UNREACHABLE_S = 5.0


def server_url() -> str:
    """Where W&B is, as far as the environment says."""
    return os.environ.get("WANDB_BASE_URL") or _SERVER


def wandb_mode() -> tuple[str, str | None]:
    """(wandb's mode, and why it is offline in spite of a file of keys). WANDB_MODE overrules; a key is that of
    WANDB_API_KEY, or the password of W&B's server in NETRC or ~/.netrc, where `wandb login` puts it."""
    given = os.environ.get("WANDB_MODE")
    if given or os.environ.get("WANDB_API_KEY"):
        return given or "online", None
    named = os.environ.get("NETRC")
    files = [Path(named)] if named else [Path("~/.netrc"), Path("~/_netrc")]
    path = next((file for file in (file.expanduser() for file in files) if file.is_file()), None)
    if path is None:
        return "offline", None
    host = urlsplit(server_url()).hostname or ""
    try:
        entry = netrc.netrc(str(path)).authenticators(host)
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError) as error:
        return "offline", f"{path} cannot be read ({error}): records stay offline; mend it, or set WANDB_API_KEY"
    if entry and entry[2]:
        return "online", None
    return "offline", None


def answers(url: str) -> bool:
    """Whether a server says anything at all, be it that it does not know us. Takes `UNREACHABLE_S` seconds at most."""
    try:
        with urllib.request.urlopen(url, timeout=UNREACHABLE_S):
            return True
    except urllib.error.HTTPError as error:
        error.close()
        return True
    except OSError as error:
        return isinstance(getattr(error, "reason", error), ssl.SSLError)
    except ValueError:
        return False
