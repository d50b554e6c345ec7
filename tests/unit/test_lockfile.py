"""versions.lock: read back as it was written, never guessed at, and never losing an entry to another writer."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from systemfiles.foundation.arch import Arch
from systemfiles.foundation.errors import CatalogError, LockTimeout
from systemfiles.foundation.lock import locked
from systemfiles.foundation.lockfile import InitrdPin, PackagePin, VersionsLock, editing_lock, read_lock
from systemfiles.foundation.paths import Paths

SHA = "ab" * 32
PIN = PackagePin(
    package="linux-image-6.1", version="1:6.1.192-2+b1~x", url="http://deb.example/x.deb", size=7, sha256=SHA
)
INPUTS = {"tree": 1, "init": {"version": "v1", "sha256": SHA}, "load": ["virtio_blk"]}


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path / "data")


def filled() -> VersionsLock:
    initrd = InitrdPin(init="v1", busybox=PIN, kernel="k-1", load=("virtio_blk",), carry=("erofs",), inputs=INPUTS)
    pulled = InitrdPin(init="v1", busybox=f"registry.example/library/busybox:1@sha256:{SHA}", inputs={"tree": 1})
    return VersionsLock(
        schema=1,
        rolling={"k": {Arch.X86_64: "k-1", Arch.AARCH64: "k-1"}},
        busybox={"busybox-static": {Arch.X86_64: PIN}},
        kernel={"k-1": {Arch.X86_64: PIN}},
        initrd={"v1-0123": {Arch.X86_64: [initrd]}, "v1-4567": {Arch.AARCH64: [pulled]}},
        current={"i": {"k-1": {Arch.X86_64: "v1-0123"}}},
    )


def test_a_lock_that_was_never_written_is_empty(paths: Paths) -> None:
    assert read_lock(paths.versions_lock) == VersionsLock(schema=1)


def test_it_is_read_back_as_it_was_written(paths: Paths) -> None:
    with editing_lock(paths) as lock:
        for table in ("rolling", "busybox", "kernel", "initrd", "current"):
            getattr(lock, table).update(getattr(filled(), table))
    assert read_lock(paths.versions_lock) == filled()


def test_equal_locks_are_equal_bytes_without_paths_of_this_host(paths: Paths) -> None:
    with editing_lock(paths) as lock:
        lock.rolling = {"b": {Arch.X86_64: "b-1"}, "a": {Arch.AARCH64: "a-1", Arch.X86_64: "a-1"}}
    first = paths.versions_lock.read_bytes()
    paths.versions_lock.unlink()
    with editing_lock(paths) as lock:
        lock.rolling = {"a": {Arch.X86_64: "a-1", Arch.AARCH64: "a-1"}, "b": {Arch.X86_64: "b-1"}}
    assert paths.versions_lock.read_bytes() == first
    assert str(paths.data_dir).encode() not in first
    assert json.loads(first)["rolling"] == {"a": {"x86_64": "a-1", "aarch64": "a-1"}, "b": {"x86_64": "b-1"}}


def test_editing_nothing_does_not_touch_the_file(paths: Paths) -> None:
    with editing_lock(paths) as lock:
        lock.rolling["k"] = {Arch.X86_64: "k-1"}
    before = paths.versions_lock.stat()
    with editing_lock(paths) as lock:
        lock.rolling["k"] = {Arch.X86_64: "k-1"}
    after = paths.versions_lock.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_an_edit_that_fails_changes_nothing(paths: Paths) -> None:
    with editing_lock(paths) as lock:
        lock.rolling["k"] = {Arch.X86_64: "k-1"}

    def interrupted() -> None:
        with editing_lock(paths) as lock:
            lock.rolling["k"] = {Arch.X86_64: "k-2"}
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert read_lock(paths.versions_lock).rolling == {"k": {Arch.X86_64: "k-1"}}


def test_whoever_edits_excludes_the_others(paths: Paths) -> None:
    with locked(paths.lock("versions")), pytest.raises(LockTimeout), editing_lock(paths, timeout=0):
        pass


def _add(data_dir: Path, number: int) -> None:
    for step in range(3):
        with editing_lock(Paths(data_dir)) as lock:
            lock.rolling[f"k{number}-{step}"] = {Arch.X86_64: "k-1"}


def test_eight_processes_that_add_entries_lose_none(paths: Paths) -> None:
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_add, args=(paths.data_dir, number)) for number in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert set(read_lock(paths.versions_lock).rolling) == {f"k{n}-{step}" for n in range(8) for step in range(3)}


def test_an_initrd_is_found_by_exactly_its_inputs(paths: Paths) -> None:
    lock = filled()
    assert lock.find_initrd(INPUTS, Arch.X86_64) == "v1-0123"
    assert lock.find_initrd(INPUTS, Arch.AARCH64) is None
    assert lock.find_initrd({**INPUTS, "tree": 2}, Arch.X86_64) is None


def pin(**changes: object) -> dict[str, object]:
    return {**PIN.model_dump(mode="json"), **changes}


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ({"schema": 2}, "schema"),
        ({"rolling": {"k": {"mips": "k-1"}}}, "rolling.k.mips"),
        ({"rolling": {"k": {"x86_64": "../../etc"}}}, "rolling.k.x86_64"),
        ({"rolling": {"../k": {"x86_64": "k-1"}}}, "rolling.../k"),
        ({"kernel": {"k": {"x86_64": pin(sha256=SHA.upper())}}}, "kernel.k.x86_64.sha256"),
        ({"kernel": {"k": {"x86_64": pin(size=-1)}}}, "kernel.k.x86_64.size"),
        ({"kernel": {"k": {"x86_64": pin(url="gopher://x")}}}, "kernel.k.x86_64.url"),
        ({"kernel": {"k": {"x86_64": pin(package="-o=x")}}}, "kernel.k.x86_64.package"),
        ({"kernel": {"k": {"x86_64": pin(version="1 2")}}}, "kernel.k.x86_64.version"),
        ({"busybox": {"b b": {}}}, "busybox.b b"),
        (
            {"initrd": {"i": {"x86_64": [{"init": "v1", "busybox": "latest", "inputs": {}}]}}},
            "initrd.i.x86_64.0.busybox",
        ),
        ([], "file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_corrupted_lock_is_a_catalog_error_that_says_where(paths: Paths, content: object, where: str) -> None:
    paths.system.mkdir(parents=True)
    paths.versions_lock.write_text(json.dumps(content))
    with pytest.raises(CatalogError) as caught:
        read_lock(paths.versions_lock)
    assert caught.value.path == paths.versions_lock
    assert any(found.startswith(where) for found, _ in caught.value.faults)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"null", b"[" * 100_000, b'{"initrd":' * 100_000, b'{"schema": 1e999}', b"9" * 100_000],
    ids=lambda content: repr(content[:12]),
)
def test_a_lock_that_is_no_json_is_a_catalog_error_and_is_not_overwritten(paths: Paths, content: bytes) -> None:
    paths.system.mkdir(parents=True)
    paths.versions_lock.write_bytes(content)
    with pytest.raises(CatalogError):
        read_lock(paths.versions_lock)
    with pytest.raises(CatalogError), editing_lock(paths):
        pass
    assert paths.versions_lock.read_bytes() == content


def test_a_directory_in_its_place_is_a_catalog_error(paths: Paths) -> None:
    paths.versions_lock.mkdir(parents=True)
    with pytest.raises(CatalogError):
        read_lock(paths.versions_lock)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["k-1", "x86_64", SHA, "\ud800", "\0"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["schema", "rolling", "kernel", "initrd", "busybox", "k", "x86_64", "inputs", "init"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(JSON)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None)
def test_json_of_any_shape_is_a_lock_or_a_catalog_error(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "versions.lock"
    path.write_text(json.dumps(value))
    with contextlib.suppress(CatalogError):
        assert isinstance(read_lock(path), VersionsLock)


def test_what_a_later_release_added_survives_a_rewrite(paths: Paths) -> None:
    paths.system.mkdir(parents=True)
    later = {"schema": 1, "colour": {"red": 1}, "kernel": {"k-1": {"x86_64": pin(signed_by="x")}}}
    paths.versions_lock.write_text(json.dumps(later))
    with editing_lock(paths) as lock:
        lock.rolling["k"] = {Arch.X86_64: "k-1"}
    found = json.loads(paths.versions_lock.read_text())
    assert found["colour"] == {"red": 1}
    assert found["kernel"]["k-1"]["x86_64"]["signed_by"] == "x"
    assert found["rolling"] == {"k": {"x86_64": "k-1"}}


def test_a_rolling_name_stands_for_what_was_provided(paths: Paths) -> None:
    assert filled().stands_for("k", Arch.X86_64) == ("k-1",)
    assert filled().stands_for("i", Arch.X86_64) == ("v1-0123",)
    assert filled().stands_for("i", Arch.AARCH64) == ()
