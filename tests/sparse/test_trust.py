"""What another user of the machine put into a cache is not loaded. Two users are two ids: these tests need root."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dsbert.sparse.kernels import dispatch, trust
from dsbert.sparse.kernels.cache import cache_directory, read_cached
from dsbert.sparse.kernels.cpu import build
from dsbert.sparse.kernels.triton_gpu import availability

NOBODY = 65534
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as two users")

TRACE = "DSBERT_TEST_TRACE"
PLANTED = """
#include <cstdio>
#include <cstdlib>
__attribute__((constructor)) static void run() { std::fclose(std::fopen(std::getenv("DSBERT_TEST_TRACE"), "w")); }
extern "C" {
void dsbert_product() {}
void dsbert_gradient() {}
void dsbert_gelu_gradient() {}
void dsbert_dropout() {}
}
"""


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache that all users may write to, as /tmp is."""
    folder = Path(tempfile.mkdtemp(prefix="shared-", dir="/tmp"))
    folder.chmod(0o1777)
    monkeypatch.setenv("DSBERT_CACHE", str(folder))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def fresh() -> Iterator[None]:
    """As in a process that has not asked for the kernels yet."""
    build.load.cache_clear()
    build.unavailable.cache_clear()
    yield
    build.load.cache_clear()
    build.unavailable.cache_clear()


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that leaves a trace where it is loaded, sealed as ours are."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted.cpp").write_text(PLANTED)
    library = folder / "planted.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-o", str(library), str(folder / "planted.cpp")], check=True)
    build._seal(library)
    return library


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our library, whose name is what an attacker has to use."""
    return build.compile_library(build.instruction_set(), tmp_path_factory.mktemp("own"))


def _folder_of_another(cache: Path) -> Path:
    (folder := cache / "uid-0").mkdir(0o755)
    os.chown(folder, NOBODY, NOBODY)
    return folder


def _link_of_another(cache: Path) -> Path:
    (folder := cache / "of nobody").mkdir(0o755)
    (link := cache / "uid-0").symlink_to(folder)
    for path in (folder, link):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    return folder


def _link_of_another_to_ours(cache: Path) -> Path:
    (folder := cache / "of root").mkdir(0o700)
    (link := cache / "uid-0").symlink_to(folder)
    os.chown(link, NOBODY, NOBODY, follow_symlinks=False)
    return folder


def _folder_that_all_write(cache: Path) -> Path:
    (folder := cache / "uid-0").mkdir()
    folder.chmod(0o777)
    return folder


def _folder_that_a_group_writes(cache: Path) -> Path:
    (folder := cache / "uid-0").mkdir()
    os.chown(folder, 0, NOBODY)
    folder.chmod(0o770)
    return folder


def _nothing_keeps_users_apart(cache: Path) -> Path:
    (folder := cache / "uid-0").mkdir(0o700)
    cache.chmod(0o777)
    return folder


def _all_of_it_anothers(cache: Path) -> Path:
    (folder := cache / "uid-0").mkdir(0o700)
    os.chown(cache, NOBODY, NOBODY)
    cache.chmod(0o755)
    return folder


BAD_FOLDERS: dict[Callable[[Path], Path], str] = {
    _folder_of_another: "uid-0 belongs to nobody",
    _link_of_another: "uid-0 belongs to nobody",
    _link_of_another_to_ours: "uid-0 belongs to nobody",
    _folder_that_all_write: "others may write to ",
    _folder_that_a_group_writes: "others may write to ",
    _nothing_keeps_users_apart: "others may write to ",
    _all_of_it_anothers: " belongs to nobody",
}


@pytest.mark.parametrize("make", BAD_FOLDERS, ids=lambda make: make.__name__.strip("_"))
def test_a_folder_that_another_user_could_have_written_to_is_no_cache(
    make: Callable[[Path], Path], shared: Path
) -> None:
    folder = make(shared)
    (folder / "secret").write_text("x")
    with pytest.raises(trust.UntrustedError) as error:
        cache_directory()
    assert BAD_FOLDERS[make] in str(error.value.strerror)
    # Nor are choices taken from there, or written there.
    table = dispatch._Table(torch.device("cpu"))
    table.write("key", {"forward": {"cpu": 1.0}})
    assert table._file() == {}
    assert [path.name for path in folder.iterdir()] == ["secret"]


@pytest.mark.slow
def test_a_planted_library_does_not_run_and_one_line_says_so(
    shared: Path, planted: Path, own: Path, fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = shared / "trace"
    monkeypatch.setenv(TRACE, str(trace))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = _folder_of_another(shared)
    shutil.copy(planted, folder / own.name)
    os.chown(folder / own.name, NOBODY, NOBODY)
    assert build.load().dsbert_dropout.argtypes
    assert not trace.exists()
    assert build.remark() == (
        f"the cache of compiled kernels is not used, {folder} belongs to nobody (user {NOBODY}): they were compiled "
        "for this process alone; set DSBERT_CACHE to a folder that only you may write to"
    )
    assert list(tmp_path.iterdir()) == []
    build._loaded(planted)
    assert trace.exists(), "the planted library is harmless: the test could not fail"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["owner", "mode", "fifo", "link"])
def test_a_planted_file_in_our_own_folder_is_replaced(
    how: str, shared: Path, planted: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that was there before the folder was closed."""
    monkeypatch.setenv(TRACE, str(shared / "trace"))
    library = cache_directory() / own.name
    assert library.parent == shared / "uid-0"
    assert stat.S_IMODE(library.parent.stat().st_mode) == 0o700
    if how == "fifo":
        os.mkfifo(library)
    elif how == "link":
        library.symlink_to(planted)
    else:
        shutil.copy(planted, library)
        library.chmod(0o666 if how == "mode" else 0o644)
        os.chown(library, NOBODY if how == "owner" else 0, 0)
    with pytest.raises(build.BuildError, match="could not be loaded"):
        build._loaded(library)
    with pytest.raises(OSError, match=r"Too many levels|belongs to|others may write|is no file"):
        read_cached(library)
    assert not build._is_whole(library)
    if how == "owner":  # once, for it takes seconds
        assert build.compile_library(build.instruction_set(), library.parent) == library
        assert library.read_bytes() == own.read_bytes()
        assert library.stat().st_uid == 0
    assert not (shared / "trace").exists()


def test_a_library_that_is_exchanged_after_it_was_looked_at_is_not_loaded(
    shared: Path, planted: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TRACE, str(shared / "trace"))
    library = cache_directory() / own.name
    shutil.copy(own, library)
    opened = trust.open_trusted

    def exchange(path: Path) -> int:
        descriptor = opened(path)
        os.replace(shutil.copy(planted, path.with_suffix(".new")), path)
        return descriptor

    monkeypatch.setattr(build, "open_trusted", exchange)
    assert build._loaded(library).dsbert_dropout
    assert not (shared / "trace").exists()


USER = """
import os
from dsbert.sparse.kernels.cpu import build
print(os.path.dirname(os.readlink(build.load()._name)), build.remark())
"""


@pytest.mark.slow
def test_two_users_share_a_cache(shared: Path, fresh: None) -> None:
    """Each has a folder of its own there, which the other cannot look into."""
    build.load()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": "/nonexistent"}
    who: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": ()}
    try:
        subprocess.run([sys.executable, "-c", "import dsbert"], env=environment, check=True, capture_output=True, **who)
    except (PermissionError, subprocess.CalledProcessError):
        pytest.skip("another user cannot run this Python, or not read this checkout")
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-P", "-c", USER],
            env=environment,
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
            **who,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [f"{shared}/uid-{NOBODY} None"]
    assert build.remark() is None
    found = {path.name: (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) for path in shared.iterdir()}
    assert found == {"uid-0": (0, 0o700), f"uid-{NOBODY}": (NOBODY, 0o700)}


@pytest.mark.parametrize("how", ["working directory", "folder of all"])
def test_a_compiler_that_a_stranger_put_there_is_not_run(
    how: str, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    (folder := shared / "bin").mkdir()
    compiler = folder / "g++"
    compiler.write_text(f"#!/bin/sh\ntouch {shared}/trace\n")
    compiler.chmod(0o755)
    if how == "folder of all":
        folder.chmod(0o777)
        monkeypatch.setenv("PATH", str(folder))
        message = f"any user may replace the C++ compiler {compiler}: set CXX to another"
    else:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("PATH", f".{os.pathsep}")
        message = "no C++ compiler was found"
    with pytest.raises(build.BuildError, match=re.escape(message)):
        build.compile_library("plain", tmp_path)
    assert not (shared / "trace").exists()


def test_the_group_of_one_user_is_no_group(shared: Path) -> None:
    """As systems make one for each user, with a umask of 002."""
    (folder := shared / "uid-0").mkdir()
    folder.chmod(0o770)
    os.chown(folder, 0, 0)
    assert cache_directory() == folder


def test_tritons_cache_is_looked_at_too(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(shared / "triton" / "not yet"))
    assert availability._why_no_cache() is None
    (shared / "triton").mkdir()
    os.chown(shared / "triton", NOBODY, NOBODY)
    reason = availability._why_no_cache()
    assert reason is not None
    assert reason.startswith(f"triton's cache is not safe, {shared}/triton belongs to nobody (user {NOBODY}): set ")
