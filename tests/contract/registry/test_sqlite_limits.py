"""A file that may not be written, a disk that is full, others that write too long: told, and mended by what is told."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from systemfiles.foundation.errors import NoSpace, StoreError
from systemfiles.foundation.paths import Paths
from systemfiles.registry.registry import Registry
from tests.contract.registry.support import Base, Clock, Running, World, asset, is_whole, registry, use
from tests.integration.support import as_nobody, stage

# ── it may not be written ────────────────────────────────────────────────────────────────────────────────────────────

_USE = """
from pathlib import Path
from systemfiles.foundation.errors import StoreError
from systemfiles.foundation.paths import Paths
from systemfiles.registry.registry import Registry
registry = Registry(Paths(Path(sys.argv[1])))
try:
    registry.leases.acquire(["a"], "vm", now=1000)
except StoreError as error:
    print(f"{error.summary} / {error.hint}")
"""


@pytest.fixture
def forbidden() -> Iterator[tuple[Registry, Path]]:
    """A registry in a place where another user gets to, and the package beside it."""
    place = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        place.chmod(0o755)
        made = registry(place / "data")
        made.assets.register(asset("a"))
        made.close()
        yield made, stage(place)
    finally:
        subprocess.run(["chmod", "-R", "u+w", str(place)], check=True)
        shutil.rmtree(place)


@pytest.mark.parametrize("mode", [0o400, 0o444, 0o000], ids=oct)
def test_a_file_that_may_not_be_written_says_who_needs_what(forbidden: tuple[Registry, Path], mode: int) -> None:
    opened, package = forbidden
    path = Paths(package / "data").registry
    opened.close()
    for directory in (path.parent, path.parent / "locks"):
        directory.chmod(0o777)
    for lock in (path.parent / "locks").iterdir():
        lock.chmod(0o666)
    path.chmod(mode)
    done = as_nobody(_USE, path.parent, package=package)
    assert done.returncode == 0, done.stderr
    assert str(path) in done.stdout
    assert "write permission" in done.stdout
    path.chmod(0o666)
    for beside in path.parent.glob("registry.sqlite-*"):
        beside.chmod(0o666)
    assert as_nobody(_USE, path.parent, package=package).stdout == ""


def test_a_directory_that_may_not_be_written_says_who_needs_what(forbidden: tuple[Registry, Path]) -> None:
    opened, package = forbidden
    path = Paths(package / "data").registry
    opened.close()
    path.chmod(0o666)
    (path.parent / "locks").chmod(0o777)
    for lock in (path.parent / "locks").iterdir():
        lock.chmod(0o666)
    path.parent.chmod(0o555)
    done = as_nobody(_USE, path.parent, package=package)
    assert done.returncode == 0, done.stderr
    assert str(path) in done.stdout
    assert "write permission" in done.stdout


def test_a_registry_that_cannot_be_made_says_who_needs_what(forbidden: tuple[Registry, Path]) -> None:
    _, package = forbidden
    data = package / "new"
    data.mkdir(mode=0o755)
    data.chmod(0o555)
    done = as_nobody(_USE, data, package=package)
    assert done.returncode == 0, done.stderr
    assert "write permission" in done.stdout


# ── there is no space ────────────────────────────────────────────────────────────────────────────────────────────────


def fill(opened: Registry, name: str = "big") -> tuple[int, StoreError]:
    """Registers assets until that fails; how many there were, and the error."""
    for number in range(10_000):
        try:
            opened.assets.register(asset(f"{name}-{number}", metadata={"text": os.urandom(20_000).hex()}))
        except StoreError as error:
            return number, error
    pytest.fail("the disk is not full")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A file system of 4 MiB; None where this process may not mount one."""
    place = tmp_path / "small"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place)]
    if subprocess.run(words, check=False, capture_output=True).returncode:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_is_told_and_work_goes_on_when_there_is_space(small_disk: Path | None, tmp_path: Path) -> None:
    place = small_disk or tmp_path
    ballast = place / "ballast"
    opened = registry(place / "data")
    opened.assets.register(asset("a"))
    opened.leases.acquire(["a"], "vm-1", now=1000)
    with limited(None if small_disk else 2 << 20):
        if small_disk:
            ballast.write_bytes(bytes(1 << 20))
        count, error = fill(opened)
        assert count > 0
        assert "registry.sqlite" in str(error)
        if small_disk:
            assert isinstance(error, NoSpace)
        assert [lease.holder for lease in opened.leases.list(now=1000)] == ["vm-1"]
        assert fill(opened, "more")[0] < count
    ballast.unlink(missing_ok=True)
    opened.assets.register(asset("after", metadata={"text": "x" * 40_000}))
    with opened.database.reading() as transaction:
        assert transaction.rows("SELECT count(*) FROM assets WHERE id LIKE 'big-%'")[0][0] >= count
    opened.close()
    assert is_whole(place / "data" / "registry.sqlite")


@contextlib.contextmanager
def limited(size: int | None) -> Iterator[None]:
    """No file grows beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        if size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_files_that_may_not_grow_are_told_and_work_goes_on_when_they_may(tmp_path: Path) -> None:
    opened = registry(tmp_path / "data")
    opened.assets.register(asset("a"))
    with limited(1 << 20):
        count, error = fill(opened)
    assert count > 0
    assert error.hint or isinstance(error, NoSpace)
    use(opened)
    opened.close()
    assert is_whole(tmp_path / "data" / "registry.sqlite")


def test_a_registry_that_is_made_on_a_full_disk_is_made_later(small_disk: Path | None, tmp_path: Path) -> None:
    place = small_disk or tmp_path
    ballast = place / "ballast"
    if small_disk:
        with contextlib.suppress(OSError), ballast.open("wb") as file:
            while True:
                file.write(bytes(1 << 16))
    opened = registry(place / "data")
    with limited(None if small_disk else 8192), pytest.raises(StoreError):
        opened.leases.list(now=1)
    ballast.unlink(missing_ok=True)
    assert opened.leases.list(now=1) == ()
    assert not opened.leases_lost


# ── it is busy, or another user's ────────────────────────────────────────────────────────────────────────────────────


def test_who_waits_too_long_for_another_writer_is_told_so(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever database it is; with little patience, so that it does not take a minute."""
    monkeypatch.setattr(f"systemfiles.registry.{base.kind}.BUSY_SECONDS", 1)
    world = World(base)
    world.add("a")
    with World(base).database.writing() as transaction:
        transaction.execute("UPDATE assets SET name = 'x'")
        error = Running(lambda: _error_of(lambda: world.leases.acquire(["a"], "vm-1", now=1000))).result()
    assert isinstance(error, StoreError)
    assert error.hint is not None
    assert "have been writing" in error.hint or "has been writing" in error.hint
    world.leases.acquire(["a"], "vm-1", now=1000)


def _error_of(call: Callable[[], object]) -> StoreError | None:
    try:
        call()
    except StoreError as error:
        return error
    return None


@pytest.mark.parametrize(("directory", "file"), [(0o2775, 0o660), (0o755, 0o600), (0o700, 0o600)], ids=oct)
def test_those_may_write_to_it_who_may_write_to_its_directory(tmp_path: Path, directory: int, file: int) -> None:
    data = tmp_path / "data"
    data.mkdir()
    data.chmod(directory)
    before = os.umask(0o077)
    try:
        opened = registry(data)
        opened.assets.register(asset("a"))
    finally:
        os.umask(before)
    for name in ("registry.sqlite", "registry.sqlite-wal", "registry.sqlite-shm"):
        assert (data / name).stat().st_mode & 0o777 == file


def test_a_path_with_every_odd_character_works(tmp_path: Path) -> None:
    for name in ("a b", "a?b=c#d%20", "ä", "'\"", "a\nb", os.fsdecode(b"\xff")):
        opened = registry(tmp_path / name, clock=Clock(5))
        opened.assets.register(asset("a"))
        assert opened.assets.get("a", now=1).id == "a"
        assert (tmp_path / name / "registry.sqlite").is_file()
