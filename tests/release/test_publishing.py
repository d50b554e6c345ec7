"""What is published can be fetched by a host that can build nothing, and read by other tools."""

from __future__ import annotations

import filecmp
import json
import subprocess
from pathlib import Path

import pytest

from systemfiles.content.artifacts import Artifact
from systemfiles.content.packaging import DOCUMENTS
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import SourceUnavailable, UnknownVersion, UsageError, VersionConflict
from systemfiles.release.dist import read_dist
from tests.release.conftest import Press, delete, entries, make_release

X86, ARM = Arch.X86_64, Arch.AARCH64


@pytest.mark.parametrize("arch", list(Arch))
def test_a_host_that_builds_nothing_has_the_same_bytes(press: Press, arch: Arch) -> None:
    key = press.key()
    press.publish(key)
    host = press.host(trusted=(key,), arch=arch)
    files = host.ensure("k-1", "i-1")
    for file, released in ((files.kernel, "kernel/k-1"), (files.initrd, "initrd/i-1")):
        assert filecmp.cmp(file.path, press.dist / released / arch.value / file.path.name, shallow=False)
    assert host.resolve("k-1", "i-1") == files
    assert host.verify().problems == ()


def test_both_architectures_are_in_one_index(press: Press) -> None:
    references = press.publish()
    index = press.index("k-1")
    assert index["artifactType"] == "application/vnd.systemfiles.kernel.v1"
    assert index["annotations"] == {"org.opencontainers.image.version": "k-1"}
    assert sorted(entries(index)) == ["amd64", "arm64"]
    assert references["k-1"].endswith(f"@{press.repository().manifest('k-1').digest}")


def test_the_documents_refer_to_the_manifest_they_are_about(press: Press) -> None:
    press.publish()
    repository = press.repository()
    for arch in Arch:
        entry = entries(press.index("k-1"))[arch.debian]
        found = {
            referrer["artifactType"]: referrer["digest"]
            for referrer in repository.referrers(Digest.parse(entry["digest"]))
        }
        assert {*found.values()} == {entry["annotations"][kind.annotation] for kind in DOCUMENTS}
        for digest in found.values():
            document = repository.manifest(digest).value
            assert document["subject"]["digest"] == entry["digest"]
            (layer,) = document["layers"]
            data = repository.small_blob(layer["digest"])
            name = layer["annotations"]["org.opencontainers.image.title"]
            assert data == (press.dist / "kernel/k-1" / arch.value / name).read_bytes()


def test_the_same_once_more_sends_nothing(press: Press, small_world_log: Path) -> None:
    key = press.key("p256")
    first = press.publish(key)
    before = _writes(small_world_log)
    assert press.publish(key) == first
    assert _writes(small_world_log) == before


def test_a_later_release_of_the_same_versions_is_the_same_publication(press: Press, tmp_path: Path) -> None:
    first = press.publish()
    later = make_release(press.world, tmp_path / "later" / "dist", when=1_770_000_000)
    assert press.publish(artifacts=read_dist(later)) == first


def test_what_is_missing_is_published_again(press: Press) -> None:
    key = press.key()
    press.publish(key)
    lost = entries(press.index("k-1"))["amd64"]["annotations"]["io.systemfiles.sbom"]
    delete(press, lost)
    press.publish(key)
    assert press.host(trusted=(key,)).ensure("k-1", "i-1").kernel.version == "k-1"


def test_nothing_is_added_to_what_is_signed_without_the_key(press: Press) -> None:
    key = press.key()
    press.publish(key, artifacts=tuple(each for each in press.artifacts if each.arch is X86))
    with pytest.raises(UsageError, match="is signed") as caught:
        press.publish()
    assert "--key" in str(caught.value.hint)
    assert press.host(trusted=(key,)).ensure("k-1", "i-1").kernel.version == "k-1"


def test_an_architecture_may_come_later(press: Press) -> None:
    key = press.key()
    press.publish(key, artifacts=tuple(each for each in press.artifacts if each.arch is X86))
    before = entries(press.index("k-1"))
    press.publish(key)
    after = entries(press.index("k-1"))
    assert after["amd64"] == before["amd64"]
    assert press.host(trusted=(key,), arch=ARM).ensure("k-1", "i-1").kernel.arch is ARM
    press.publish(key, artifacts=tuple(each for each in press.artifacts if each.arch is X86))
    assert entries(press.index("k-1")) == after


def test_a_version_that_is_published_is_never_changed(press: Press) -> None:
    press.publish()
    (other,) = (each for each in press.artifacts if (each.version, each.arch) == ("k-2", X86))
    record = {**other.record, "version": "k-1"}
    disguised = Artifact("kernel", "k-1", X86, other.directory, other.files, record)
    before = press.index("k-1")
    with pytest.raises(VersionConflict) as caught:
        press.publish(artifacts=(disguised,))
    assert "manifest" in caught.value.changes
    assert press.index("k-1") == before


def test_a_host_asks_each_registry_in_turn(press: Press) -> None:
    press.publish()
    host = press.host(registries=("127.0.0.1:1/closed", f"{press.world.host}/empty", press.registry))
    assert host.ensure("k-1", "i-1").kernel.version == "k-1"


def test_what_no_registry_has_is_built_where_that_is_allowed(press: Press) -> None:
    assert press.host(build=True).ensure("k-1", "i-1").kernel.version == "k-1"


def test_what_no_registry_has_is_not_built_where_that_is_not_allowed(press: Press) -> None:
    host = press.host()
    with pytest.raises(SourceUnavailable) as caught:
        host.ensure("k-1", "i-1")
    assert [where for where, _ in caught.value.tried] == [f"{press.registry}/kernel:k-1"]
    assert "404" in str(caught.value)
    assert "systemfiles provision" in str(caught.value.hint)


def test_where_no_registry_is_configured_that_is_told(press: Press) -> None:
    with pytest.raises(SourceUnavailable, match="none is configured") as caught:
        press.host(registries=()).ensure("k-1", "i-1")
    assert "SYSTEMFILES_REGISTRY" in str(caught.value.hint)


def test_a_version_that_only_the_registry_knows(press: Press) -> None:
    """A host's catalog need not be as new as the release."""
    press.publish()
    host = press.host()
    catalog = Path(str(host.paths.data_dir) + ".toml")
    text = "\n".join(line for line in catalog.read_text().splitlines() if line.startswith(("registries", "build")))
    catalog.write_text(f"schema = 1\n{text}\n")
    assert host.ensure("k-2", "i-2").kernel.version == "k-2"
    with pytest.raises((UnknownVersion, SourceUnavailable)):
        host.ensure("k-9", "i-2")


def test_skopeo_reads_it(press: Press, tmp_path: Path) -> None:
    press.publish()
    source = f"docker://{press.registry}/kernel:k-1"
    raw = _skopeo("inspect", "--raw", "--tls-verify=false", source)
    assert Digest.of(raw) == press.repository().manifest("k-1").digest
    _skopeo("copy", "--all", "--src-tls-verify=false", source, f"oci:{tmp_path}/copy:k-1")
    for entry in press.index("k-1")["manifests"]:
        assert (tmp_path / "copy" / "blobs" / "sha256" / entry["digest"].removeprefix("sha256:")).is_file()


def test_oras_pulls_the_files(press: Press, tmp_path: Path) -> None:
    import oras.client  # type: ignore[import-untyped]

    press.publish()
    entry = entries(press.index("k-1"))["amd64"]
    client = oras.client.OrasClient(insecure=True)
    client.pull(target=f"{press.registry}/kernel@{entry['digest']}", outdir=str(tmp_path / "pulled"))
    assert filecmp.cmp(tmp_path / "pulled" / "vmlinux", press.dist / "kernel/k-1/x86_64/vmlinux", shallow=False)
    assert json.loads((tmp_path / "pulled" / "artifact.json").read_bytes())["version"] == "k-1"


@pytest.fixture
def small_world_log(press: Press) -> Path:
    return press.world.root / "registry" / "log"


def _writes(log: Path) -> int:
    return sum(log.read_text().count(f'"{method} ') for method in ("PUT", "POST", "PATCH"))


def _skopeo(*words: str) -> bytes:
    done = subprocess.run(["skopeo", *words], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout
