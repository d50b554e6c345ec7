"""Artifact directories: what is intact is handed out without reading it, and nothing else is handed out at all."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from systemfiles.content.artifacts import MODULES, RECORD, STAMPS, Artifact, Artifacts, boot_file, parse_record
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import (
    DigestMismatch,
    IntegrityError,
    InvalidName,
    NotProvisioned,
    SizeMismatch,
    StoreError,
    SystemFilesError,
)
from systemfiles.foundation.paths import INITRD, KERNEL, Paths

DATA = b"vmlinux" * 1000
MORE = b"modules" * 500
CHECKED = (KERNEL, "k1", Arch.X86_64)


def facts(data: bytes) -> dict[str, object]:
    return {"sha256": Digest.of(data).hex, "size": len(data)}


def record(**changes: object) -> dict[str, Any]:
    plain = {
        "schema": 1,
        "kind": KERNEL,
        "version": "k1",
        "arch": "x86_64",
        "files": {"vmlinux": facts(DATA), MODULES: facts(MORE)},
        "inputs": {"sha256": Digest.of(DATA).hex},
    }
    return {**plain, **changes}


def publish(paths: Paths, version: str = "k1") -> Artifact:
    """A kernel with modules, as provisioning publishes it."""
    blobs = paths.data_dir / "blobs" / version
    blobs.mkdir(parents=True)
    for name, data in (("vmlinux", DATA), (MODULES, MORE)):
        (blobs / name).write_bytes(data)
        (blobs / name).chmod(0o444)
    files = {name: blobs / name for name in ("vmlinux", MODULES)}
    return Artifacts(paths).publish(
        record(version=version), files, created_at="2026-11-20T00:00:00Z", created_by="a test"
    )


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path / "data")


@pytest.fixture
def artifact(paths: Paths) -> Artifact:
    return publish(paths)


def edit(path: Path, data: bytes, *, forge: bool = False) -> None:
    """Writes into the file in place; with `forge`, its time says that nothing happened."""
    before = path.stat()
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(stat.S_IMODE(before.st_mode))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + (0 if forge else 1_000_000_000)))


def age(path: Path) -> None:
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns - 5_000_000_000))


@contextlib.contextmanager
def without_roots_override() -> Iterator[None]:
    """File permissions hold for root, too: capset(2) on this thread drops CAP_DAC_OVERRIDE and _READ_SEARCH."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    effective = sets[0]
    sets[0] = effective & ~0b110
    assert libc.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = effective
        assert libc.capset(header, sets) == 0


@pytest.fixture
def read_only(artifact: Artifact, paths: Paths) -> Iterator[Artifact]:
    """The artifact in a copied data directory that nobody may write."""
    copied = Paths(paths.data_dir.with_name("copy"))
    shutil.copytree(paths.data_dir, copied.data_dir)
    directories = [copied.data_dir, *(path for path in copied.data_dir.rglob("*") if path.is_dir())]
    for directory in directories:
        directory.chmod(0o555)
    with without_roots_override():
        yield Artifacts(copied).load(*CHECKED)
    for directory in directories:
        directory.chmod(0o755)


# publishing


def test_a_published_artifact_is_links_stamps_and_a_record(artifact: Artifact, paths: Paths) -> None:
    assert artifact.directory == paths.artifact(*CHECKED)
    assert sorted(path.name for path in artifact.directory.iterdir()) == [RECORD, MODULES, STAMPS, "vmlinux"]
    assert artifact.path.samefile(paths.data_dir / "blobs" / "k1" / "vmlinux")
    assert stat.S_IMODE((artifact.directory / RECORD).stat().st_mode) == 0o444
    whole = json.loads((artifact.directory / RECORD).read_text())
    assert whole == {**record(), "created_at": "2026-11-20T00:00:00Z", "created_by": "a test"}
    assert Artifacts(paths).load(*CHECKED) == artifact
    assert list(paths.tmp.iterdir()) == []


def test_an_artifact_knows_its_file_its_inputs_and_the_kernel_it_needs(artifact: Artifact) -> None:
    assert (artifact.file, artifact.path.name) == ("vmlinux", "vmlinux")
    assert artifact.inputs == record()["inputs"]
    assert artifact.requires_kernel is None
    assert artifact._replace(record={**record(), "requires_kernel": "k1"}).requires_kernel == "k1"
    assert [boot_file(kind, arch) for kind in (KERNEL, INITRD) for arch in Arch] == [
        "vmlinux",
        "Image",
        "initrd",
        "initrd",
    ]


def test_nothing_is_there_until_the_record_is(paths: Paths) -> None:
    (paths.data_dir).mkdir()
    (paths.data_dir / "blob").write_bytes(DATA)
    blobs = {"vmlinux": paths.data_dir / "blob", MODULES: paths.data_dir / "no blob"}
    with pytest.raises(StoreError):
        Artifacts(paths).publish(record(), blobs, created_at="now", created_by="a test")
    with pytest.raises(NotProvisioned):
        Artifacts(paths).load(*CHECKED)


def test_publishing_again_repairs_what_is_there(artifact: Artifact, paths: Paths) -> None:
    artifact.path.unlink()
    artifact.path.write_bytes(b"damaged")
    blobs = {name: paths.data_dir / "blobs" / "k1" / name for name in ("vmlinux", MODULES)}
    again = Artifacts(paths).publish(record(), blobs, created_at="later", created_by="a test")
    Artifacts(paths).check(again, "vmlinux", MODULES)
    assert artifact.path.samefile(blobs["vmlinux"])


# checking: what may happen to a file, and what that means


def _nothing(artifact: Artifact) -> None:
    pass


def _touched(artifact: Artifact) -> None:
    age(artifact.path)


def _replaced_by_the_same(artifact: Artifact) -> None:
    artifact.path.unlink()
    artifact.path.write_bytes(DATA)


def _without_stamps(artifact: Artifact) -> None:
    (artifact.directory / STAMPS).unlink()


def _forged(artifact: Artifact) -> None:
    edit(artifact.path, b"X" * len(DATA), forge=True)


def _edited(artifact: Artifact) -> None:
    edit(artifact.path, b"X" * len(DATA))


def _replaced_by_another_of_that_time(artifact: Artifact) -> None:
    other = artifact.directory / "other"
    other.write_bytes(b"X" * len(DATA))
    shutil.copystat(artifact.path, other)
    other.replace(artifact.path)


def _truncated(artifact: Artifact) -> None:
    edit(artifact.path, DATA[:-1])


def _truncated_and_forged(artifact: Artifact) -> None:
    edit(artifact.path, DATA[:-1], forge=True)


def _emptied(artifact: Artifact) -> None:
    edit(artifact.path, b"")


def _longer(artifact: Artifact) -> None:
    edit(artifact.path, DATA + b"X")


def _symlink(artifact: Artifact) -> None:
    artifact.path.rename(artifact.path.with_name("moved"))
    artifact.path.symlink_to("moved")


def _dangling(artifact: Artifact) -> None:
    artifact.path.unlink()
    artifact.path.symlink_to("nowhere")


def _directory(artifact: Artifact) -> None:
    artifact.path.unlink()
    artifact.path.mkdir()


def _pipe(artifact: Artifact) -> None:
    artifact.path.unlink()
    os.mkfifo(artifact.path)


def _missing(artifact: Artifact) -> None:
    artifact.path.unlink()


FATES: list[tuple[Callable[[Artifact], None], type[SystemFilesError] | None]] = [
    (_nothing, None),
    (_touched, None),
    (_replaced_by_the_same, None),
    (_without_stamps, None),
    (_forged, None),
    (_edited, DigestMismatch),
    (_replaced_by_another_of_that_time, DigestMismatch),
    (_truncated, SizeMismatch),
    (_truncated_and_forged, SizeMismatch),
    (_emptied, SizeMismatch),
    (_longer, SizeMismatch),
    (_symlink, IntegrityError),
    (_dangling, IntegrityError),
    (_directory, IntegrityError),
    (_pipe, IntegrityError),
    (_missing, NotProvisioned),
]


@pytest.mark.parametrize("used_before", [False, True], ids=["new process", "running process"])
@pytest.mark.parametrize(("happens", "kind"), FATES, ids=lambda value: getattr(value, "__name__", "").strip("_"))
def test_a_file_is_handed_out_only_while_it_is_intact(
    artifact: Artifact,
    paths: Paths,
    happens: Callable[[Artifact], None],
    kind: type[SystemFilesError] | None,
    used_before: bool,
) -> None:
    artifacts = Artifacts(paths)
    if used_before:
        artifacts.check(artifact)
    happens(artifact)
    for _ in range(2):
        if kind is None:
            artifacts.check(artifact)
            continue
        with pytest.raises(SystemFilesError) as caught:
            artifacts.check(artifact)
        assert type(caught.value) is kind
        assert str(artifact.path) in str(caught.value)


def test_only_the_file_that_is_asked_for_is_looked_at(artifact: Artifact, paths: Paths) -> None:
    (artifact.directory / MODULES).unlink()
    Artifacts(paths).check(artifact)
    with pytest.raises(NotProvisioned):
        Artifacts(paths).check(artifact, MODULES)
    with pytest.raises(NotProvisioned):
        Artifacts(paths).check(artifact, *artifact.files)


def test_a_file_whose_stamp_fits_is_not_read_again(artifact: Artifact, paths: Paths) -> None:
    edit(artifact.path, b"X" * len(DATA), forge=True)
    Artifacts(paths).check(artifact)
    (problem,) = Artifacts(paths).verify(artifact)
    assert isinstance(problem, DigestMismatch)


def test_a_refreshed_stamp_spares_the_next_process_the_reading(artifact: Artifact, paths: Paths) -> None:
    age(artifact.path)
    Artifacts(paths).check(artifact)
    found = artifact.path.stat()
    stamps = json.loads((artifact.directory / STAMPS).read_text())
    assert stamps["vmlinux"] == [found.st_dev, found.st_ino, found.st_mtime_ns, Digest.of(DATA).hex]
    assert MODULES in stamps
    edit(artifact.path, b"X" * len(DATA), forge=True)
    Artifacts(paths).check(artifact)


def test_linking_a_file_does_not_make_it_suspicious(artifact: Artifact, paths: Paths) -> None:
    before = (artifact.directory / STAMPS).stat().st_mtime_ns
    os.link(artifact.path, paths.data_dir / "jail")
    artifact.path.chmod(0o400)
    Artifacts(paths).check(artifact)
    assert (artifact.directory / STAMPS).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[]", b"5", b'{"vmlinux": 5}', b'{"vmlinux": [1, 2]}', b'{"vmlinux": {}}', b"[" * 100_000],
    ids=lambda content: repr(content[:12]),
)
def test_unreadable_stamps_only_cost_a_reading(artifact: Artifact, paths: Paths, content: bytes) -> None:
    (artifact.directory / STAMPS).write_bytes(content)
    Artifacts(paths).check(artifact)
    assert json.loads((artifact.directory / STAMPS).read_text())["vmlinux"]
    (artifact.directory / STAMPS).write_bytes(content)
    edit(artifact.path, b"X" * len(DATA), forge=True)
    with pytest.raises(DigestMismatch):
        Artifacts(paths).check(artifact)


def test_a_copied_data_directory_is_intact_and_gets_its_own_stamps(artifact: Artifact, paths: Paths) -> None:
    copied = Paths(paths.data_dir.with_name("copy"))
    shutil.copytree(paths.data_dir, copied.data_dir)
    loaded = Artifacts(copied).load(*CHECKED)
    Artifacts(copied).check(loaded)
    edit(loaded.path, b"X" * len(DATA), forge=True)
    Artifacts(copied).check(loaded)
    Artifacts(paths).check(artifact)


def test_a_damaged_copy_is_caught(artifact: Artifact, paths: Paths) -> None:
    copied = Paths(paths.data_dir.with_name("copy"))
    shutil.copytree(paths.data_dir, copied.data_dir)
    edit(copied.artifact(*CHECKED) / "vmlinux", b"X" * len(DATA), forge=True)
    with pytest.raises(DigestMismatch):
        Artifacts(copied).check(Artifacts(copied).load(*CHECKED))


def test_a_read_only_copy_is_read_once_by_each_process(read_only: Artifact, paths: Paths) -> None:
    copied = Paths(paths.data_dir.with_name("copy"))
    stale = (read_only.directory / STAMPS).read_bytes()
    artifacts = Artifacts(copied)
    artifacts.check(read_only)
    assert (read_only.directory / STAMPS).read_bytes() == stale
    edit(read_only.path, b"X" * len(DATA), forge=True)
    artifacts.check(read_only)
    with pytest.raises(DigestMismatch):
        Artifacts(copied).check(read_only)


# verifying


def test_verifying_reads_every_file_and_reports_each_that_is_wrong(artifact: Artifact, paths: Paths) -> None:
    assert list(Artifacts(paths).verify(artifact)) == []
    edit(artifact.path, b"X" * len(DATA), forge=True)
    (artifact.directory / MODULES).unlink()
    assert {type(problem) for problem in Artifacts(paths).verify(artifact)} == {DigestMismatch, NotProvisioned}


def test_what_was_found_damaged_is_not_handed_out_any_more(artifact: Artifact, paths: Paths) -> None:
    artifacts = Artifacts(paths)
    artifacts.check(artifact)
    edit(artifact.path, b"X" * len(DATA), forge=True)
    assert len(list(artifacts.verify(artifact))) == 1
    assert not (artifact.directory / STAMPS).exists()
    for user in (artifacts, Artifacts(paths)):
        with pytest.raises(DigestMismatch):
            user.check(artifact)


def test_damage_is_reported_even_where_nothing_may_be_written(read_only: Artifact, paths: Paths) -> None:
    edit(read_only.path, b"X" * len(DATA), forge=True)
    problems = list(Artifacts(Paths(paths.data_dir.with_name("copy"))).verify(read_only))
    assert [type(problem) for problem in problems] == [DigestMismatch]


def test_stamps_that_cannot_be_forgotten_are_a_store_error(read_only: Artifact, paths: Paths) -> None:
    with pytest.raises(StoreError, match=STAMPS):
        Artifacts(Paths(paths.data_dir.with_name("copy"))).forget(read_only)


# records


def test_a_version_that_was_never_provisioned_says_where_it_was_looked_for(paths: Paths) -> None:
    with pytest.raises(NotProvisioned) as caught:
        Artifacts(paths).load(*CHECKED)
    assert caught.value.looked_in == paths.artifact(*CHECKED)


@pytest.mark.parametrize("version", ["../k1", "..", "", "k1/../k1", "/etc", "K1", "k1\0", "k1\n"])
def test_a_name_that_would_leave_its_directory_is_refused(paths: Paths, version: str) -> None:
    with pytest.raises(InvalidName):
        Artifacts(paths).load(KERNEL, version, Arch.X86_64)


def test_the_record_of_another_version_is_refused(artifact: Artifact, paths: Paths) -> None:
    other = publish(paths, "k2")
    (artifact.directory / RECORD).unlink()
    shutil.copy(other.directory / RECORD, artifact.directory / RECORD)
    with pytest.raises(IntegrityError) as caught:
        Artifacts(paths).load(*CHECKED)
    assert (caught.value.expected, caught.value.got) == ("kernel k1 (x86_64)", "kernel k2 (x86_64)")


def test_a_renamed_directory_is_refused(artifact: Artifact, paths: Paths) -> None:
    artifact.directory.parent.rename(paths.kind(KERNEL) / "k9")
    with pytest.raises(IntegrityError):
        Artifacts(paths).load(KERNEL, "k9", Arch.X86_64)
    with pytest.raises(NotProvisioned):
        Artifacts(paths).load(*CHECKED)


def initrd(**changes: object) -> dict[str, Any]:
    plain = record(kind=INITRD, version="i1", files={"initrd": facts(DATA)}, content_sha256="ab" * 32)
    return {**{key: value for key, value in plain.items() if key not in changes}, **changes}


@pytest.mark.parametrize("good", [record(), initrd(), initrd(requires_kernel="k1"), record(theirs=1)])
def test_a_record_is_taken_with_whatever_else_it_says(good: dict[str, Any]) -> None:
    assert parse_record(json.dumps(good).encode(), "here") == good


def files(**changes: object) -> dict[str, object]:
    return {"files": {"vmlinux": {**facts(DATA), **changes}}}


def also(name: str) -> dict[str, object]:
    return {"files": {"vmlinux": facts(DATA), name: facts(DATA)}}


UNRELIABLE: dict[str, object] = {
    "empty": b"",
    "cut off": json.dumps(record()).encode()[:-1],
    "no text": b"\xff\xfe",
    "null": b"null",
    "a list": b"[]",
    "too deep": b"[" * 100_000,
    "schema 2": record(schema=2),
    "schema '1'": record(schema="1"),
    "kind 5": record(kind=5),
    "kind disk": record(kind="disk"),
    "version 5": record(version=5),
    "no version": record(version=None),
    "arch mips": record(arch="mips"),
    "no arch": record(arch=None),
    "inputs a list": record(inputs=[]),
    "no inputs": record(inputs=None),
    "no files": record(files={}),
    "files a list": record(files=[]),
    "files null": record(files=None),
    "file null": record(files={"vmlinux": None}),
    "file of another architecture": record(files={"Image": facts(DATA)}),
    "size a text": record(**files(size="7000")),
    "no size": record(**files(size=None)),
    "negative size": record(**files(size=-1)),
    "no sha256": record(**files(sha256=None)),
    "sha256 a number": record(**files(sha256=5)),
    "sha256 too short": record(**files(sha256="ab")),
    "sha256 a path": record(**files(sha256="../" * 21 + "a")),
    "sha256 with its algorithm": record(**files(sha256=Digest.of(DATA))),
    "file above": record(**also("../vmlinux")),
    "file elsewhere": record(**also("/etc/passwd")),
    "file ..": record(**also("..")),
    "file .": record(**also(".")),
    "file without a name": record(**also("")),
    "file with NUL": record(**also("a\0b")),
    "file with a surrogate": record(**also("\ud800")),
    "the record itself": record(**also(RECORD)),
    "the stamps": record(**also(STAMPS)),
    "no content": {key: value for key, value in initrd().items() if key != "content_sha256"},
    "content a number": initrd(content_sha256=5),
    "required kernel a list": initrd(requires_kernel=["k1"]),
}


@pytest.mark.parametrize("content", UNRELIABLE.values(), ids=UNRELIABLE.keys())
def test_a_record_that_cannot_be_relied_on_is_refused(content: object) -> None:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    with pytest.raises(IntegrityError) as caught:
        parse_record(raw, "here")
    assert caught.value.subject == "here"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["kernel", "k1", "x86_64", "ab" * 32]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from([*record(), "sha256"]), inner, max_size=3)
    ),
    max_leaves=5,
)
PLACES = st.sampled_from(
    [(key,) for key in record()] + [("files", "vmlinux"), ("files", "vmlinux", "sha256"), ("files", "x")]
)


@given(PLACES, JSON)
def test_whatever_a_record_says_it_is_a_record_or_an_integrity_error(place: tuple[str, ...], value: object) -> None:
    changed = record()
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with contextlib.suppress(IntegrityError):
        parse_record(json.dumps(changed).encode(), "here")


def test_a_directory_in_place_of_the_record_is_an_integrity_error(artifact: Artifact, paths: Paths) -> None:
    (artifact.directory / RECORD).unlink()
    (artifact.directory / RECORD).mkdir()
    with pytest.raises(IntegrityError):
        Artifacts(paths).load(*CHECKED)


# listing


def test_all_versions_are_listed_in_order_and_nothing_else_is(paths: Paths) -> None:
    assert list(Artifacts(paths).versions(KERNEL)) == []
    for version in ("k2", "k1"):
        publish(paths, version)
    (paths.kind(KERNEL) / "unfinished" / "x86_64").mkdir(parents=True)
    (paths.kind(KERNEL) / "k1" / "mips").mkdir()
    (paths.kind(KERNEL) / "k1" / "mips" / RECORD).write_text("{}")
    (paths.kind(KERNEL) / "README").write_text("hello")
    assert list(Artifacts(paths).versions(KERNEL)) == [("k1", Arch.X86_64), ("k2", Arch.X86_64)]
    assert list(Artifacts(paths).versions(INITRD)) == []


@pytest.mark.parametrize("stray", ["Old k1", "k1~", "k1/amd64"])
def test_a_directory_that_is_no_version_is_not_listed(paths: Paths, stray: str) -> None:
    directory = paths.kind(KERNEL) / stray
    directory = directory if "/" in stray else directory / "x86_64"
    directory.mkdir(parents=True)
    (directory / RECORD).write_text(json.dumps(record()))
    assert list(Artifacts(paths).versions(KERNEL)) == []


# what a review found


def test_a_record_with_another_digest_is_not_believed_because_of_a_stamp(artifact: Artifact, paths: Paths) -> None:
    Artifacts(paths).check(artifact)
    record = json.loads((artifact.directory / RECORD).read_text())
    record["files"]["vmlinux"]["sha256"] = "0" * 64
    (artifact.directory / RECORD).chmod(0o644)
    (artifact.directory / RECORD).write_text(json.dumps(record))
    with pytest.raises(DigestMismatch):
        Artifacts(paths).check(Artifacts(paths).load(*CHECKED))


def test_what_verify_found_is_refused_by_a_process_that_saw_it_intact(artifact: Artifact, paths: Paths) -> None:
    running = Artifacts(paths)
    running.check(artifact)
    edit(artifact.path, b"X" * len(DATA), forge=True)
    assert len(list(Artifacts(paths).verify(artifact))) == 1
    with pytest.raises(DigestMismatch):
        running.check(artifact)


def test_a_directory_without_a_record_is_told_of(artifact: Artifact, paths: Paths) -> None:
    assert list(Artifacts(paths).unfinished(KERNEL)) == []
    (artifact.directory / RECORD).unlink()
    assert list(Artifacts(paths).unfinished(KERNEL)) == [artifact.directory]
