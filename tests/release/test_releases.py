"""A release is built twice and compared; its folder is whole, checked, and the same for the same commit."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from systemfiles.foundation.arch import Arch
from systemfiles.foundation.catalog import load_catalog
from systemfiles.foundation.errors import DigestMismatch, IntegrityError, SystemFilesError, UsageError
from systemfiles.release import building
from systemfiles.release.building import origin_of, release
from systemfiles.release.dist import read_dist
from tests.release.conftest import ORIGIN, PAIRS, make_release
from tests.retention.world import World


def tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def difference(one: Path, other: Path) -> str:
    """What two folders differ in, for a person; as diffoscope tells it where that is installed."""
    if shutil.which("diffoscope"):
        return subprocess.run(["diffoscope", one, other], capture_output=True, text=True, check=False).stdout
    left, right = tree(one), tree(other)
    return ", ".join(sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name)))


def test_two_releases_of_one_commit_are_the_same_bytes(small_world: World, dist: Path, tmp_path: Path) -> None:
    again = make_release(small_world, tmp_path / "elsewhere" / "and deeper" / "dist")
    assert tree(again) == tree(dist), difference(dist, again)


def test_the_folder_is_what_sha256sum_accepts(dist: Path) -> None:
    done = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=dist, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in dist.iterdir()} == {"SHA256SUMS", "kernel", "initrd"}
    names = {path.name for path in (dist / "kernel" / "k-1" / "x86_64").iterdir()}
    assert names == {"vmlinux", "artifact.json", "sbom.cdx.json", "provenance.json"}


def test_everybody_may_read_it(dist: Path) -> None:
    """A web server is another user, whatever the umask of who released."""
    for path in (dist, *dist.rglob("*")):
        assert path.stat().st_mode & 0o044 == 0o044, path


def test_nothing_in_it_tells_of_the_builder(dist: Path) -> None:
    words = [os.uname().nodename.encode(), str(dist.parent).encode(), str(Path.home()).encode() + b"/"]
    for name, data in tree(dist).items():
        if name.endswith(".json"):
            assert not [word for word in words if len(word) > 3 and word in data], name


def test_a_release_replaces_the_one_before(small_world: World, tmp_path: Path) -> None:
    dist = make_release(small_world, tmp_path / "dist")
    make_release(small_world, dist, pairs=PAIRS[:1])
    assert {artifact.version for artifact in read_dist(dist)} == {"k-1", "i-1"}
    assert [*tmp_path.iterdir()] == [dist]


def test_builds_that_differ_are_no_release(small_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An initrd that depends on the time zone, say; here, how it is compressed does."""
    dist = make_release(small_world, tmp_path / "dist", pairs=PAIRS[:1])
    before = tree(dist)
    spoilt = (
        "import os, systemfiles.recipes.initrd as initrd; initrd.LEVEL = 0 if os.environ['TZ'] == 'UTC' else 9; "
        + building._CHILD
    )
    monkeypatch.setattr(building, "_CHILD", spoilt)
    with pytest.raises(IntegrityError, match="initrd of initrd i-1") as caught:
        make_release(small_world, dist, pairs=PAIRS[:1])
    assert caught.value.expected != caught.value.got
    assert tree(dist) == before
    assert [*tmp_path.iterdir()] == [dist]


def test_a_folder_that_is_something_else_is_left_alone(small_world: World, tmp_path: Path) -> None:
    """Wheels are built into dist/ as well."""
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "a.whl").write_text("mine")
    with pytest.raises(UsageError, match="is no release"):
        make_release(small_world, tmp_path / "dist")
    assert (tmp_path / "dist" / "a.whl").read_text() == "mine"


def test_a_builder_that_is_none_is_told_before_anything_is_built(small_world: World, tmp_path: Path) -> None:
    for wrong in (ORIGIN._replace(builder="me"), ORIGIN._replace(when=10**15), ORIGIN._replace(source="HEAD")):
        with pytest.raises(UsageError):
            release([("none", None, Arch.X86_64)], load_catalog(small_world.catalog), tmp_path, tmp_path / "d", wrong)


def test_what_cannot_be_built_is_told_and_nothing_is_left(small_world: World, tmp_path: Path) -> None:
    targets = [("packaged", None, Arch.AARCH64)]
    with pytest.raises(SystemFilesError):
        release(targets, load_catalog(small_world.catalog), tmp_path / "lock", tmp_path / "dist", ORIGIN)
    assert [*tmp_path.iterdir()] == []


# ── reading one ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def copy(dist: Path, tmp_path: Path) -> Path:
    shutil.copytree(dist, tmp_path / "copy")
    return tmp_path / "copy"


def _rewrite(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def test_a_changed_file_is_refused(copy: Path) -> None:
    path = copy / "kernel" / "k-1" / "x86_64" / "vmlinux"
    data = path.read_bytes()
    _rewrite(path, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DigestMismatch, match="vmlinux"):
        read_dist(copy)


def test_a_file_too_few_or_too_many_is_refused(copy: Path) -> None:
    path = copy / "kernel" / "k-1" / "x86_64" / "sbom.cdx.json"
    path.rename(copy / "unknown.json")
    with pytest.raises(IntegrityError) as caught:
        read_dist(copy)
    assert "sbom.cdx.json missing" in str(caught.value.got)
    assert "unknown.json unknown" in str(caught.value.got)


def test_a_record_of_another_version_is_refused_even_when_the_sums_are_right(copy: Path) -> None:
    (copy / "kernel" / "k-1").rename(copy / "kernel" / "k-9")
    sums = copy / "SHA256SUMS"
    _rewrite(sums, sums.read_bytes().replace(b"kernel/k-1/", b"kernel/k-9/"))
    with pytest.raises(IntegrityError, match=r"artifact\.json"):
        read_dist(copy)


@pytest.mark.parametrize("data", [b"no sums\n", b"\xff\xfe\n", b"0" * 64 + b"  ../../etc/passwd\n"])
def test_sums_that_are_none_are_refused(copy: Path, data: bytes) -> None:
    _rewrite(copy / "SHA256SUMS", data)
    with pytest.raises(IntegrityError):
        read_dist(copy)


def test_a_release_without_a_document_is_told_before_anything_is_pushed(dist: Path, tmp_path: Path) -> None:
    copied = tmp_path / "dist"
    shutil.copytree(dist, copied)
    lost = "kernel/k-1/x86_64/sbom.cdx.json"
    (copied / lost).unlink()
    lines = (copied / "SHA256SUMS").read_text().splitlines(keepends=True)
    (copied / "SHA256SUMS").unlink()
    (copied / "SHA256SUMS").write_text("".join(line for line in lines if lost not in line))
    with pytest.raises(IntegrityError, match=r"expected  sbom\.cdx\.json"):
        read_dist(copied)


def test_a_folder_that_is_no_release_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="doit release"):
        read_dist(tmp_path)


# ── whose it is ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    def git(*words: str) -> None:
        named = {
            "GIT_AUTHOR_NAME": "a",
            "GIT_AUTHOR_EMAIL": "a@b",
            "GIT_COMMITTER_NAME": "a",
            "GIT_COMMITTER_EMAIL": "a@b",
        }
        dated = {"GIT_AUTHOR_DATE": "2026-01-02T03:04:05Z", "GIT_COMMITTER_DATE": "2026-01-02T03:04:05Z"}
        subprocess.run(["git", *words], cwd=tmp_path, env={**os.environ, **named, **dated}, check=True)

    git("init", "-q")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-qm", "first")
    git("remote", "add", "origin", "https://user:secret@git.example.com/systemfiles.git")
    return tmp_path


def test_a_release_is_as_old_as_its_commit(checkout: Path) -> None:
    origin = origin_of(checkout, {})
    assert origin.when == 1767323045
    assert origin.source is not None
    assert origin.source.startswith("git+https://")
    assert len(origin.source.rpartition("@")[2]) == 40


def test_changes_that_no_commit_has_are_not_said_to_be_of_one(checkout: Path) -> None:
    (checkout / "file").write_text("b")
    assert origin_of(checkout, {}).source is None


def test_another_repository_is_not_taken_for_this_one(checkout: Path) -> None:
    (checkout / "inside").mkdir()
    assert origin_of(checkout / "inside", {"SOURCE_DATE_EPOCH": "1"}).source is None
    assert origin_of(None, {"SOURCE_DATE_EPOCH": "1"}).source is None


def test_the_time_may_be_given(tmp_path: Path) -> None:
    origin = origin_of(tmp_path, {"SOURCE_DATE_EPOCH": "1700000000", "SYSTEMFILES_BUILDER": "https://ci.example.com/1"})
    assert origin == ("https://ci.example.com/1", None, 1700000000)


@pytest.mark.parametrize("environ", [{}, {"SOURCE_DATE_EPOCH": "yesterday"}, {"SOURCE_DATE_EPOCH": "-1"}])
def test_no_time_is_no_release(tmp_path: Path, environ: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="SOURCE_DATE_EPOCH"):
        origin_of(tmp_path, environ)
