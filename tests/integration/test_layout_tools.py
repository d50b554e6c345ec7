"""Other programs read the content store as the OCI image layout it is, and their collection frees nothing of ours."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from systemfiles import SystemFiles
from tests.conftest import ARCHES, Provisioned, doit
from tests.integration.support import Completed, completed, done_tasks, tree

pytestmark = pytest.mark.network


def layout_of(provisioned: Provisioned) -> Path:
    return provisioned.data_dir / "system" / "oci-cache"


def named(layout: Path) -> dict[str, dict[str, Any]]:
    index = json.loads((layout / "index.json").read_text())
    return {entry["annotations"]["org.opencontainers.image.ref.name"]: entry for entry in index["manifests"]}


def ok(*command: str | Path) -> Completed:
    ran = completed([*map(str, command)])
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran


def test_there_is_a_name_for_each_kernel_initrd_and_busybox(provisioned: Provisioned) -> None:
    kinds = sorted(name.partition("-")[0] for name in named(layout_of(provisioned)))
    assert kinds == ["busybox", "busybox", "initrd", "initrd", "kernel", "kernel"]


def test_skopeo_inspects_every_name_and_sees_its_platform(provisioned: Provisioned) -> None:
    layout = layout_of(provisioned)
    for name, entry in named(layout).items():
        found = json.loads(ok("skopeo", "inspect", f"oci:{layout}:{name}").stdout)
        assert found["Digest"] == entry["digest"]
        assert found["Os"] == "linux"
        assert found["Architecture"] == ("arm64" if name.endswith("aarch64") else "amd64")
        raw = ok("skopeo", "inspect", "--raw", f"oci:{layout}:{name}").stdout.encode()
        assert f"sha256:{hashlib.sha256(raw).hexdigest()}" == entry["digest"]


def test_skopeo_copies_every_name_out_byte_for_byte(provisioned: Provisioned, tmp_path: Path) -> None:
    layout, copy = layout_of(provisioned), tmp_path / "copy"
    for name in named(layout):
        ok("skopeo", "--insecure-policy", "copy", "--preserve-digests", f"oci:{layout}:{name}", f"oci:{copy}:{name}")
    assert tree(copy / "blobs") == tree(layout / "blobs")
    for blob in (copy / "blobs" / "sha256").iterdir():
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name
    assert {n: e["digest"] for n, e in named(copy).items()} == {n: e["digest"] for n, e in named(layout).items()}


def test_umoci_lists_and_reads_every_name(provisioned: Provisioned) -> None:
    layout = layout_of(provisioned)
    assert sorted(ok("umoci", "list", "--layout", layout).stdout.split()) == sorted(named(layout))
    for name in named(layout):
        ok("umoci", "stat", "--json", "--image", f"{layout}:{name}")


def test_a_busybox_image_unpacks_to_a_root_file_system(provisioned: Provisioned, tmp_path: Path) -> None:
    layout = layout_of(provisioned)
    name = next(name for name in named(layout) if name.startswith("busybox") and name.endswith("x86_64"))
    ok("umoci", "unpack", "--rootless", "--image", f"{layout}:{name}", tmp_path / "bundle")
    assert (tmp_path / "bundle" / "rootfs" / "bin" / "busybox").read_bytes() == provisioned.busybox("x86_64")


def test_umoci_gc_frees_nothing_of_ours_and_doit_has_nothing_to_do_after_it(copied: Path) -> None:
    before = tree(copied)
    ok("umoci", "gc", "--layout", copied / "system" / "oci-cache")
    assert tree(copied) == before
    again = doit("profile=debian", f"arch={','.join(ARCHES)}", f"data_dir={copied}")
    assert (again.returncode, done_tasks(again.stdout)) == (0, set())
    assert SystemFiles(copied).verify().problems == ()


def test_names_of_others_survive_what_doit_does(copied: Path) -> None:
    layout = copied / "system" / "oci-cache"
    busybox = next(name for name in named(layout) if name.startswith("busybox"))
    ok("umoci", "tag", "--image", f"{layout}:{busybox}", "theirs")
    kernel = next(name for name in named(layout) if name.startswith("kernel"))
    ok("umoci", "remove", "--image", f"{layout}:{kernel}")
    again = doit("profile=debian", f"arch={','.join(ARCHES)}", f"data_dir={copied}")
    assert (again.returncode, done_tasks(again.stdout)) == (0, {"manifest"}), again.stdout + again.stderr
    assert {"theirs", kernel} <= set(named(layout))


def test_sha256sum_accepts_the_list_of_everything_provisioned(provisioned: Provisioned) -> None:
    system = provisioned.data_dir / "system"
    listed = completed(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=system)
    assert listed.returncode == 0, listed.stdout + listed.stderr
    artifacts = [path for kind in ("kernel", "initrd") for path in (system / kind).rglob("*") if path.suffix != ".json"]
    assert listed.stdout.count(": OK\n") == sum(path.is_file() for path in artifacts)


def test_the_bytes_of_an_artifact_exist_once(provisioned: Provisioned) -> None:
    system = provisioned.data_dir / "system"
    inodes = {path.stat().st_ino for path in (system / "oci-cache" / "blobs" / "sha256").iterdir()}
    for kind in ("kernel", "initrd"):
        for path in (system / kind).rglob("*"):
            if path.is_file() and path.suffix != ".json":
                assert path.stat().st_ino in inodes, path
