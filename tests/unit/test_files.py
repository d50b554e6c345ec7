"""How files come to be: whole or not at all, whatever the umask, the disk or the user does meanwhile."""

from __future__ import annotations

import contextlib
import errno
import gc
import multiprocessing
import os
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import DigestMismatch, NoSpace, SizeMismatch, StoreError
from systemfiles.foundation.files import (
    NEW,
    STAGED,
    WORK,
    NewFile,
    copy,
    free_bytes,
    link_or_copy,
    make_dirs,
    publish,
    remove_abandoned,
    scratch_dir,
    storing,
    write_file,
)

DATA = b"vmlinux" * 1000


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "tmp"


@pytest.fixture(params=[0o000, 0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def other_file_system(tmp_path: Path) -> Iterator[Path]:
    """A directory on another file system than tmp_path; /dev/shm is one on every Linux host."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        assert Path(name).stat().st_dev != tmp_path.stat().st_dev, "set --basetemp to a directory outside /dev/shm"
        yield Path(name)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def left_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def commit(
    scratch: Path, final: Path, *, size: int = len(DATA), digest: Digest | None = None, full: bool = False
) -> None:
    """What every writer does, on a full disk if need be."""
    with NewFile(scratch) as out:
        if full:
            fill_the_disk_under(out.path)
        out.write(DATA)
        out.check("kernel", size=size, digest=digest)
        out.commit(final)


def fill_the_disk_under(path: Path) -> None:
    """Whatever this process writes to the open file at `path` ends as on a full disk: in the kernel's /dev/full."""
    (descriptor,) = (
        int(link.name) for link in Path("/proc/self/fd").iterdir() if link.is_symlink() and link.readlink() == path
    )
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, descriptor)
    os.close(full)


# directories


def test_directories_are_readable_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    tmp_path.chmod(0o755)
    make_dirs(tmp_path / "a" / "b")
    assert (mode(tmp_path / "a"), mode(tmp_path / "a" / "b")) == (0o755, 0o755)


def test_what_a_parent_grants_its_group_is_inherited_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o2775)
    make_dirs(shared / "a" / "b")
    assert (mode(shared / "a"), mode(shared / "a" / "b")) == (0o2775, 0o2775)


def test_a_private_parent_does_not_make_its_children_writable_for_the_group(tmp_path: Path, umask: int) -> None:
    private = tmp_path / "private"
    private.mkdir()
    private.chmod(0o700)
    make_dirs(private / "a")
    assert mode(private / "a") & 0o022 == 0


def test_an_existing_directory_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a").chmod(0o700)
    make_dirs(tmp_path / "a")
    assert mode(tmp_path / "a") == 0o700


def test_a_directory_that_may_not_be_made_is_a_store_error_that_names_it() -> None:
    with pytest.raises(StoreError) as caught:
        make_dirs(Path("/sys/systemfiles/a"))  # not even root makes directories there
    assert "/sys/systemfiles" in str(caught.value)
    assert caught.value.hint


def test_a_file_where_a_directory_should_be_is_a_store_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"")
    with pytest.raises(StoreError) as caught:
        make_dirs(tmp_path / "data" / "system")
    assert str(tmp_path / "data") in str(caught.value)


# new files


def test_a_committed_file_is_whole_read_only_and_alone(tmp_path: Path, scratch: Path, umask: int) -> None:
    with NewFile(scratch) as out:
        for start in range(0, len(DATA), 999):
            out.write(DATA[start : start + 999])
        out.check("it", size=len(DATA), digest=Digest.of(DATA))
        assert left_in(tmp_path) == ["tmp"]
        out.commit(tmp_path / "final")
    assert (tmp_path / "final").read_bytes() == DATA
    assert mode(tmp_path / "final") == 0o444
    assert left_in(scratch) == []


def test_a_file_that_is_not_committed_disappears(scratch: Path) -> None:
    with NewFile(scratch) as out:
        out.write(DATA)
        assert out.path.exists()
    assert left_in(scratch) == []


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_file_disappears(scratch: Path, interruption: type[BaseException]) -> None:
    def interrupted() -> None:
        with NewFile(scratch) as out:
            out.write(DATA)
            raise interruption

    with pytest.raises(interruption):
        interrupted()
    assert left_in(scratch) == []


def test_an_unfinished_file_is_nobody_elses_business(scratch: Path, umask: int) -> None:
    with NewFile(scratch) as out:
        assert mode(out.path) == 0o600


def test_a_wrong_size_is_refused_and_leaves_nothing(tmp_path: Path, scratch: Path) -> None:
    with pytest.raises(SizeMismatch) as caught:
        commit(scratch, tmp_path / "final", size=len(DATA) + 1)
    assert (caught.value.expected, caught.value.got) == (f"{len(DATA) + 1} bytes", f"{len(DATA)} bytes")
    assert left_in(tmp_path) == ["tmp"]
    assert left_in(scratch) == []


def test_a_wrong_digest_is_refused_and_leaves_nothing(tmp_path: Path, scratch: Path) -> None:
    with pytest.raises(DigestMismatch) as caught:
        commit(scratch, tmp_path / "final", digest=Digest.of(b"other"))
    assert (caught.value.expected, caught.value.got) == (Digest.of(b"other"), Digest.of(DATA))
    assert left_in(tmp_path) == ["tmp"]
    assert left_in(scratch) == []


def test_a_restarted_file_holds_only_what_came_after(tmp_path: Path, scratch: Path) -> None:
    with NewFile(scratch) as out:
        out.write(DATA)
        out.restart()
        assert (out.size, out.digest()) == (0, Digest.of(b""))
        out.write(b"short")
        out.commit(tmp_path / "final")
        assert out.digest() == Digest.of(b"short")
    assert (tmp_path / "final").read_bytes() == b"short"


def test_a_full_disk_is_no_space_and_leaves_nothing(tmp_path: Path, scratch: Path) -> None:
    with pytest.raises(NoSpace) as caught:
        commit(scratch, tmp_path / "final", full=True)
    assert caught.value.free > 0
    assert left_in(tmp_path) == ["tmp"]
    assert left_in(scratch) == []


def test_what_is_replaced_keeps_its_own_inode(tmp_path: Path, scratch: Path) -> None:
    final, held = tmp_path / "final", tmp_path / "held"
    write_file(final, b"old", scratch=scratch)
    os.link(final, held)
    write_file(final, b"new", scratch=scratch, mode=0o644)
    assert (final.read_bytes(), held.read_bytes()) == (b"new", b"old")
    assert mode(final) == 0o644


def test_a_file_is_written_with_the_directories_above_it(tmp_path: Path, scratch: Path) -> None:
    write_file(tmp_path / "a" / "b" / "c", DATA, scratch=scratch)
    assert (tmp_path / "a" / "b" / "c").read_bytes() == DATA


def test_a_directory_under_the_final_name_is_not_overwritten(tmp_path: Path, scratch: Path) -> None:
    (tmp_path / "final" / "inner").mkdir(parents=True)
    with pytest.raises(StoreError, match="final"):
        write_file(tmp_path / "final", DATA, scratch=scratch)
    assert (tmp_path / "final" / "inner").is_dir()
    assert left_in(scratch) == []


def test_a_published_file_has_moved_and_is_read_only(tmp_path: Path) -> None:
    source, final = tmp_path / "source", tmp_path / "final"
    source.write_bytes(DATA)
    publish(source, final)
    assert not source.exists()
    assert (final.read_bytes(), mode(final)) == (DATA, 0o444)


# links and copies


def test_a_linked_file_is_the_same_inode(tmp_path: Path, scratch: Path) -> None:
    source, final = tmp_path / "source", tmp_path / "final"
    source.write_bytes(DATA)
    link_or_copy(source, final, scratch=scratch)
    assert final.samefile(source)
    assert left_in(scratch) == []


def test_across_file_systems_it_is_a_read_only_copy(tmp_path: Path, other_file_system: Path) -> None:
    source, final = tmp_path / "source", other_file_system / "final"
    source.write_bytes(DATA)
    link_or_copy(source, final, scratch=other_file_system / "tmp")
    assert not final.samefile(source)
    assert (final.read_bytes(), mode(final)) == (DATA, 0o444)
    assert left_in(other_file_system / "tmp") == []


def test_a_link_replaces_what_has_its_name_and_spares_that_inode(tmp_path: Path, scratch: Path) -> None:
    source, final, held = tmp_path / "source", tmp_path / "final", tmp_path / "held"
    source.write_bytes(DATA)
    final.write_bytes(b"damaged")
    os.link(final, held)
    link_or_copy(source, final, scratch=scratch)
    assert (final.read_bytes(), held.read_bytes()) == (DATA, b"damaged")


def test_linking_a_missing_file_leaves_what_was_there(tmp_path: Path, scratch: Path) -> None:
    (tmp_path / "final").write_bytes(b"old")
    with pytest.raises(StoreError):
        link_or_copy(tmp_path / "nowhere", tmp_path / "final", scratch=scratch)
    assert (tmp_path / "final").read_bytes() == b"old"
    assert left_in(scratch) == []


def test_a_copy_onto_a_full_disk_is_no_space_and_leaves_nothing(
    tmp_path: Path, other_file_system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "source").write_bytes(DATA)
    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(NoSpace):
        link_or_copy(tmp_path / "source", other_file_system / "final", scratch=other_file_system / "tmp")
    assert left_in(other_file_system) == ["tmp"]
    assert left_in(other_file_system / "tmp") == []


def test_a_copy_is_a_new_inode_and_never_overwrites(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(DATA)
    copy(source, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == DATA
    assert not (tmp_path / "copy").samefile(source)
    (tmp_path / "copy").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        copy(source, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"mine"


# scratch and errors


def test_a_scratch_directory_is_traversable_and_goes_with_all_it_holds(scratch: Path, umask: int) -> None:
    with scratch_dir(scratch) as work:
        assert mode(work) == 0o755
        (work / "deep" / "er").mkdir(parents=True)
        (work / "deep" / "er" / "file").write_bytes(DATA)
    assert left_in(scratch) == []


def test_an_interrupted_scratch_directory_goes_too(scratch: Path) -> None:
    with pytest.raises(KeyboardInterrupt), scratch_dir(scratch):
        raise KeyboardInterrupt
    assert left_in(scratch) == []


def test_many_processes_may_make_the_same_directory_and_use_it_at_once(tmp_path: Path) -> None:
    def use(number: int) -> None:
        for step in range(40):
            directory = tmp_path / str(step) / "locks"
            make_dirs(directory)
            (directory / str(number)).touch()

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=use, args=(number,)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert {len(left_in(tmp_path / str(step) / "locks")) for step in range(40)} == {4}


# what others left

LATER = 3600.0


def work_and_die(scratch: Path) -> None:
    """A process that is killed while it has a new file and a directory there."""
    child = os.fork()
    if child == 0:
        new, work = NewFile(scratch), scratch_dir(scratch)
        new.write(DATA)
        (work.__enter__() / "file").write_bytes(DATA)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)


def grow_old(directory: Path) -> None:
    for path in directory.iterdir():
        os.utime(path, (time.time() - LATER, time.time() - LATER))


def test_what_a_killed_process_left_is_removed_when_it_is_old(scratch: Path) -> None:
    work_and_die(scratch)
    assert len(left_in(scratch)) == 2
    remove_abandoned(scratch, NEW, WORK)
    assert len(left_in(scratch)) == 2
    grow_old(scratch)
    remove_abandoned(scratch, NEW, WORK)
    assert left_in(scratch) == []


def test_what_somebody_works_on_stays_however_old_it_is(scratch: Path) -> None:
    with NewFile(scratch) as new, scratch_dir(scratch) as work:
        new.write(DATA)
        (work / "file").write_bytes(DATA)
        grow_old(scratch)
        remove_abandoned(scratch, NEW, WORK)
        assert (work / "file").read_bytes() == DATA
        new.commit(scratch / "final")
    grow_old(scratch)
    remove_abandoned(scratch, NEW, WORK)
    assert left_in(scratch) == ["final"]


def test_only_names_that_were_asked_for_are_removed_and_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    number = "0123456789abcdef"
    (tmp_path / f"{STAGED}{number}").mkdir()
    strangers = ["new-file", "new-", f"new-{number}0", f"x{STAGED}{number}", f"{STAGED}{number}.bak", "work-mine"]
    for name in strangers:
        (tmp_path / name).mkdir()
    (tmp_path / f"work-{number}").symlink_to("theirs")
    grow_old(tmp_path)
    remove_abandoned(tmp_path, STAGED, NEW, WORK)
    assert left_in(tmp_path) == sorted([*strangers, "theirs", f"work-{number}"])


def test_a_directory_behind_a_link_is_not_swept(tmp_path: Path, scratch: Path) -> None:
    work_and_die(scratch)
    grow_old(scratch)
    (tmp_path / "link").symlink_to(scratch)
    remove_abandoned(tmp_path / "link", NEW, WORK)
    assert len(left_in(scratch)) == 2


@pytest.mark.parametrize("call", ["open", "mkdir", "chmod", "fsync", "replace"])
def test_ctrl_c_after_any_call_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    write_file(tmp_path / "final", b"old", scratch=tmp_path / "tmp")
    for work in (
        lambda: write_file(tmp_path / "final", b"new", scratch=tmp_path / "tmp"),
        lambda: scratch_dir(tmp_path / "tmp").__enter__(),
        lambda: make_dirs(tmp_path / "made"),
    ):
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(os, call, interrupted_once_after(getattr(os, call)))
            work()
        gc.collect()  # a generator that was not ended
    assert left_in(tmp_path / "tmp") == []
    assert {*left_in(tmp_path)} <= {"final", "tmp", "made"}


def interrupted_once_after(function: Callable[..., object]) -> Callable[..., object]:
    """Ctrl-C as soon as `function` did what it does for the first time."""
    interruptions = [KeyboardInterrupt()]

    def called(*arguments: object, **options: object) -> object:
        result = function(*arguments, **options)
        if interruptions:
            raise interruptions.pop()
        return result

    return called


def test_a_directory_that_is_not_there_has_nothing_left_in_it(tmp_path: Path) -> None:
    remove_abandoned(tmp_path / "nowhere")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_or_quota_is_no_space_with_what_was_needed(tmp_path: Path, number: int) -> None:
    with pytest.raises(NoSpace) as caught, storing(tmp_path / "not" / "yet", needed=123):
        raise OSError(number, os.strerror(number))
    assert (caught.value.needed, caught.value.free > 0) == (123, True)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_disk_that_may_not_be_written_is_a_store_error_that_says_why(tmp_path: Path, number: int) -> None:
    with pytest.raises(StoreError) as caught, storing(tmp_path):
        raise OSError(number, os.strerror(number), str(tmp_path / "file"))
    assert not isinstance(caught.value, NoSpace)
    assert os.strerror(number) in caught.value.summary
    assert str(tmp_path / "file") in caught.value.summary


def test_any_other_failure_of_the_system_is_a_store_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="Input/output error"), storing(tmp_path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_free_space_is_that_of_the_nearest_parent_that_exists(tmp_path: Path) -> None:
    assert abs(free_bytes(tmp_path / "not" / "yet") - shutil.disk_usage(tmp_path).free) < 1 << 30
