"""SBOMs: what is inside, from where, under which licence; valid CycloneDX, and always the same bytes."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from systemfiles.content.artifacts import MODULES, Artifact, FileFacts
from systemfiles.content.packaging import SBOM
from systemfiles.foundation import cpio
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import DigestMismatch, IntegrityError, InvalidArchive, SystemFilesError
from systemfiles.release.documents import documents
from systemfiles.release.sbom import sbom
from tests.unit.test_kmod import module
from tests.unit.test_provenance import BUILDER, BUSYBOX, DEB, IMAGE, SOURCE, WHEN

ROOT = "lib/modules/6.1.0"
SCRIPT = b"#!/bin/busybox sh\n"
INDEX = {f"{ROOT}/modules.dep": b"kernel/a.ko:\n", f"{ROOT}/modules.alias": b""}
MODULE_FILES = {
    f"{ROOT}/kernel/a.ko": module(b"license=GPL\0name=a\0"),
    f"{ROOT}/kernel/drivers/b-c.ko": module(b"license=Dual MIT/GPL\0name=b_c\0"),
    f"{ROOT}/kernel/silent.ko": module(b"name=silent\0"),
}
FILES = {
    "bin/busybox": b"\x7fELF busybox",
    "etc/modules": b"a\n",
    "etc/passwd": b"root:x:0:0::/root:/bin/sh\n",
    "init": SCRIPT,
    **INDEX,
    **MODULE_FILES,
}
APPLETS = tuple(cpio.hardlink(f"bin/{name}", "bin/busybox") for name in ("[", "cat", "chmod", "ls", "mv", "vi"))
VALIDATOR = JsonStrictValidator(SchemaVersion.V1_6)
EPOCH = "1970-01-01T00:00:00+00:00"


def sha256(data: bytes) -> str:
    return Digest.of(data).hex


def initrd(
    directory: Path,
    files: Mapping[str, bytes] | None = None,
    *,
    busybox: object = BUSYBOX,
    extra: tuple[cpio.Record, ...] = (),
    modular: bool = True,
    **changes: object,
) -> Artifact:
    """A small initrd with links and devices beside these files, and its record."""
    records = [cpio.file(name, data) for name, data in (FILES if files is None else files).items()]
    content = io.BytesIO()
    cpio.write([*records, cpio.symlink("bin/sh", "busybox"), cpio.char_device("dev/null", 1, 3), *extra], content)
    packed = gzip.compress(content.getvalue(), mtime=0)
    (directory / "initrd").write_bytes(packed)
    inputs: dict[str, Any] = {"tree": 2, "init": {"version": "v1.0.0", "sha256": sha256(SCRIPT)}}
    if modular:
        inputs["kernel"] = {"modules": "b" * 64}
    record = {
        "inputs": inputs,
        "content_sha256": sha256(content.getvalue()),
        "source": {"busybox": busybox},
        "requires_kernel": "linux-1" if modular else None,
        "compressor": "zlib 1.2.13 level 9",
        **changes,
    }
    return Artifact(
        "initrd", "v1-abc", Arch.X86_64, directory, {"initrd": FileFacts(sha256(packed), len(packed))}, record
    )


def kernel(directory: Path, source: object, modules: Mapping[str, bytes] | None = None) -> Artifact:
    """A kernel whose boot file is on record only: it is not read."""
    files = {"vmlinux": FileFacts("a" * 64, 1)}
    if modules is not None:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for name, data in modules.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        (directory / MODULES).write_bytes(packed.getvalue())
        files[MODULES] = FileFacts(sha256(packed.getvalue()), len(packed.getvalue()))
    record = {"inputs": {"sha256": "c" * 64}, "source": source, "release": "6.1.0"}
    return Artifact("kernel", "linux-1", Arch.X86_64, directory, files, record)


def document(artifact: Artifact) -> dict[str, Any]:
    """The SBOM of `artifact`, which CycloneDX's own schema takes, without a field that it does not know."""
    raw = sbom(artifact, when=0).decode()
    assert VALIDATOR.validate_str(raw) is None
    found: dict[str, Any] = json.loads(raw)
    return found


def part(found: dict[str, Any], role: str) -> dict[str, Any]:
    (one,) = (component for component in found["components"] if component["bom-ref"] == f"part:{role}")
    assert isinstance(one, dict)
    return one


def inner(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for component in found["components"]:
        yield from component.get("components", ())


def digest_of(component: dict[str, Any]) -> str:
    (digest,) = component["hashes"]
    assert digest["alg"] == "SHA-256"
    return str(digest["content"])


def licence_of(found: dict[str, Any], name: str) -> object:
    (one,) = (component for component in inner(found) if component["name"] == name)
    return one.get("licenses")


def test_every_file_of_an_initrd_is_listed_once_with_its_digest(tmp_path: Path) -> None:
    listed = [
        (place["location"], digest_of(file))
        for file in inner(document(initrd(tmp_path)))
        for place in file["evidence"]["occurrences"]
    ]
    assert sorted(listed) == sorted((name, sha256(data)) for name, data in FILES.items())


def test_every_file_is_below_what_it_comes_from(tmp_path: Path) -> None:
    found = document(initrd(tmp_path))
    assert {
        component["bom-ref"]: sorted(file["bom-ref"].removeprefix("file:") for file in component["components"])
        for component in found["components"]
    } == {
        "part:busybox": ["bin/busybox", "etc/passwd"],
        "part:init": ["init"],
        "part:modules.tar": sorted(MODULE_FILES),
        "part:tree": ["etc/modules", *sorted(INDEX)],
    }
    assert found["dependencies"][0] == {
        "ref": "artifact:initrd/v1-abc/x86_64",
        "dependsOn": ["part:busybox", "part:init", "part:modules.tar", "part:tree"],
    }


def test_the_artifact_is_described_by_its_digests_and_the_given_time(tmp_path: Path) -> None:
    artifact = initrd(tmp_path)
    found = document(artifact)
    main = found["metadata"]["component"]
    assert found["metadata"]["timestamp"] == EPOCH
    assert (main["type"], main["name"], main["version"]) == ("operating-system", "initrd", "v1-abc")
    assert digest_of(main) == artifact.files["initrd"].sha256
    assert {one["name"]: one["value"] for one in main["properties"]} == {
        "systemfiles:arch": "x86_64",
        "systemfiles:file": "initrd",
        "systemfiles:content_sha256": artifact.record["content_sha256"],
        "systemfiles:compressor": "zlib 1.2.13 level 9",
        "systemfiles:requires_kernel": "linux-1",
    }


def test_busybox_is_a_package_with_its_licence_and_where_it_was(tmp_path: Path) -> None:
    busybox = part(document(initrd(tmp_path)), "busybox")
    assert (busybox["name"], busybox["version"]) == (BUSYBOX["package"], BUSYBOX["version"])
    assert busybox["purl"] == ("pkg:deb/debian/busybox-static@1:1.35.0-4%2Bdeb12u1%2Bb1?arch=amd64&distro=debian-12")
    assert digest_of(busybox) == BUSYBOX["sha256"]
    assert busybox["licenses"] == [{"license": {"id": "GPL-2.0-only"}}]
    (place,) = busybox["externalReferences"]
    assert (place["type"], place["url"]) == ("distribution", BUSYBOX["url"])


def test_busybox_of_an_image_is_named_by_its_digest_and_tag(tmp_path: Path) -> None:
    reference = f"docker.io/library/busybox:1.37.0-musl@sha256:{IMAGE}"
    files = {name: FILES[name] for name in ("bin/busybox", "init")}
    found = document(initrd(tmp_path, files, busybox=reference, modular=False, extra=APPLETS))
    assert [component["bom-ref"] for component in found["components"]] == ["part:busybox", "part:init"]
    busybox = part(found, "busybox")
    assert (busybox["name"], busybox["version"], digest_of(busybox)) == ("busybox", "1.37.0-musl", IMAGE)
    assert busybox["purl"] == (
        f"pkg:oci/busybox@sha256:{IMAGE}?repository_url=docker.io/library/busybox&tag=1.37.0-musl"
    )
    (file,) = busybox["components"]  # one file with all these names
    names = [place["location"] for place in file["evidence"]["occurrences"]]
    assert names == sorted(["bin/busybox", *(applet.name for applet in APPLETS)])
    assert digest_of(file) == sha256(FILES["bin/busybox"])


@pytest.mark.parametrize(
    ("modinfo", "licences"),
    [
        (b"license=GPL\0", [{"license": {"id": "GPL-2.0-only"}}]),
        (b"license=GPL v2\0license=GPL\0", [{"license": {"id": "GPL-2.0-only"}}]),
        (b"license=Dual MIT/GPL\0", [{"expression": "GPL-2.0-only OR MIT"}]),
        (b"license=Dual BSD/GPL\0", [{"expression": "GPL-2.0-only OR LicenseRef-BSD"}]),
        (
            b"license=Dual MIT/GPL\0license=GPL\0",
            [{"expression": "GPL-2.0-only AND (GPL-2.0-only OR MIT)"}],
        ),
        (b"license=Proprietary\0", [{"license": {"name": "Proprietary"}}]),
        (b"license=\xff\n\0license=GPL\0", [{"license": {"name": "GPL and \\xff\\n"}}]),
        (b"license=" + b"x" * 5000 + b"\0", [{"license": {"name": "x" * 200}}]),
        (b"license=\0", None),
        (b"name=a\0licenses=GPL\0license\0", None),
        (b"", None),
    ],
)
def test_a_modules_licence_is_what_it_declares(tmp_path: Path, modinfo: bytes, licences: object) -> None:
    found = document(kernel(tmp_path, DEB, {f"{ROOT}/kernel/one.ko": module(modinfo)}))
    assert licence_of(found, "one") == licences


@pytest.mark.parametrize("data", [b"", b"#!/bin/sh\n", module(b"license=GPL\0")[:-1]])
def test_what_is_called_a_module_and_is_none_has_no_licence(tmp_path: Path, data: bytes) -> None:
    found = document(initrd(tmp_path, {**FILES, f"{ROOT}/kernel/odd.ko": data}))
    assert licence_of(found, "odd") is None


def test_a_kernel_lists_its_package_and_its_modules(tmp_path: Path) -> None:
    artifact = kernel(tmp_path, DEB, {**INDEX, **MODULE_FILES})
    found = document(artifact)
    main = found["metadata"]["component"]
    assert (main["type"], main["name"], main["version"]) == ("operating-system", "linux", "linux-1")
    assert digest_of(main) == "a" * 64
    assert main["licenses"] == [{"expression": "GPL-2.0-only WITH Linux-syscall-note"}]
    assert {"name": "systemfiles:release", "value": "6.1.0"} in main["properties"]
    package = part(found, "kernel")
    assert package["purl"] == "pkg:deb/debian/linux-image-6.1.0-56-cloud-amd64@6.1.192-2?arch=amd64"
    assert digest_of(package) == DEB["sha256"]
    assert package["externalReferences"][0]["url"] == DEB["url"]
    modules = part(found, MODULES)
    assert digest_of(modules) == artifact.files[MODULES].sha256
    assert {file["bom-ref"].removeprefix("file:"): digest_of(file) for file in modules["components"]} == {
        name: sha256(data) for name, data in {**INDEX, **MODULE_FILES}.items()
    }
    assert {file["name"] for file in modules["components"]} == {"a", "b_c", "silent", *INDEX}


def test_a_kernel_from_a_download_names_its_url(tmp_path: Path) -> None:
    origin = part(
        document(kernel(tmp_path, {"url": "https://example.com/vmlinux-x86_64", "sha256": "c" * 64})), "kernel"
    )
    assert (origin["name"], digest_of(origin)) == ("vmlinux-x86_64", "c" * 64)
    assert origin["externalReferences"][0]["url"] == "https://example.com/vmlinux-x86_64"


@pytest.mark.parametrize("source", [{"added_from": "vmlinux-of-alice"}, {}, None, 5])
def test_a_kernel_that_was_added_by_hand_says_so_and_nothing_of_the_host(tmp_path: Path, source: object) -> None:
    artifact = kernel(tmp_path, source)
    origin = part(document(artifact), "kernel")
    assert (origin["description"], digest_of(origin)) == ("added by hand", "c" * 64)
    assert "purl" not in origin
    assert b"alice" not in sbom(artifact, when=0)


def test_nothing_of_the_host_is_in_it(tmp_path: Path) -> None:
    for artifact in (initrd(tmp_path), kernel(tmp_path, {**DEB, "url": f"file:{tmp_path}/a.deb"}, MODULE_FILES)):
        assert str(tmp_path) not in sbom(artifact, when=0).decode()


def test_names_that_no_text_can_hold_are_told_apart(tmp_path: Path) -> None:
    odd = {"etc/\udcff": b"1", "etc/\\xff": b"2", "etc/a\nb": b"3", "etc/%FF": b"4"}
    names = ("part:init", "initrd", "tree", "busybox")  # nor are files taken for the parts
    found = document(initrd(tmp_path, {**FILES, **odd, **dict.fromkeys(names, b"6")}))
    references = [component["bom-ref"] for component in (*found["components"], *inner(found))]
    assert len(references) == len(set(references)) == 4 + len(FILES) + len(odd) + len(names)
    assert not [reference for reference in references if reference.startswith("BomRef")]
    assert "etc/a\\nb" in {file["name"] for file in inner(found)}


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    artifact = initrd(tmp_path)
    artifact.path.write_bytes(artifact.path.read_bytes() + b"\0")
    with pytest.raises(DigestMismatch):
        sbom(artifact, when=0)
    modular = kernel(tmp_path, DEB, MODULE_FILES)
    (tmp_path / MODULES).write_bytes(bytes(10240))
    with pytest.raises(DigestMismatch):
        sbom(modular, when=0)


def test_a_lost_file_is_told(tmp_path: Path) -> None:
    lost = [initrd(tmp_path), kernel(tmp_path, DEB, MODULE_FILES)]
    for name in ("initrd", MODULES):
        (tmp_path / name).unlink()
    for artifact in lost:
        with pytest.raises(IntegrityError, match="No such file"):
            sbom(artifact, when=0)


def test_an_initrd_of_another_content_than_on_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DigestMismatch):
        sbom(initrd(tmp_path, content_sha256="f" * 64), when=0)


@pytest.mark.parametrize(
    "packed",
    [b"", b"junk", gzip.compress(b"no cpio"), gzip.compress(b"")[:-1], gzip.compress(b"a") + gzip.compress(b"b")],
    ids=["empty", "junk", "no-cpio", "cut", "two-members"],  # gzip holds the time; a test's name must not
)
def test_an_initrd_that_cannot_be_read_is_refused(tmp_path: Path, packed: bytes) -> None:
    (tmp_path / "initrd").write_bytes(packed)
    facts = FileFacts(sha256(packed), len(packed))
    artifact = initrd(tmp_path, content_sha256=sha256(b"no cpio"))._replace(files={"initrd": facts})
    (tmp_path / "initrd").write_bytes(packed)
    with pytest.raises(SystemFilesError):
        sbom(artifact, when=0)


def test_modules_that_occur_twice_are_refused(tmp_path: Path) -> None:
    artifact = kernel(tmp_path, DEB, MODULE_FILES)
    with tarfile.open(tmp_path / MODULES, "a") as tar:
        tar.addfile(tarfile.TarInfo(f"{ROOT}/kernel/a.ko"))
    raw = (tmp_path / MODULES).read_bytes()
    artifact.files[MODULES] = FileFacts(sha256(raw), len(raw))
    with pytest.raises(InvalidArchive, match="twice"):
        sbom(artifact, when=0)


def test_the_serial_number_is_the_contents(tmp_path: Path) -> None:
    artifact = initrd(tmp_path)
    serial = document(artifact)["serialNumber"]
    assert json.loads(sbom(artifact, when=WHEN))["serialNumber"] == serial
    other = initrd(tmp_path, {**FILES, "etc/more": b""})
    assert document(other)["serialNumber"] != serial


OTHER_PROCESS = """
import sys
from pathlib import Path
from tests.unit.test_sbom import APPLETS, DEB, INDEX, MODULE_FILES, initrd, kernel, sbom
directory = Path(sys.argv[1])
for artifact in (initrd(directory, extra=APPLETS), kernel(directory, DEB, {**INDEX, **MODULE_FILES})):
    sys.stdout.buffer.write(sbom(artifact, when=0))
"""


@pytest.mark.parametrize(("seed", "zone", "locale"), [("1", "Asia/Kathmandu", "C"), ("2", "UTC+12", "C.UTF-8")])
def test_any_process_writes_the_same_bytes(tmp_path: Path, seed: str, zone: str, locale: str) -> None:
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(
            [sys.executable, "-c", OTHER_PROCESS, elsewhere],
            cwd=Path(__file__).parent.parent.parent,
            env={**os.environ, "PYTHONHASHSEED": seed, "TZ": zone, "LC_ALL": locale},
            check=True,
            capture_output=True,
        )
    here = (initrd(tmp_path, extra=APPLETS), kernel(tmp_path, DEB, {**INDEX, **MODULE_FILES}))
    assert done.stdout == b"".join(sbom(artifact, when=0) for artifact in here)


def test_both_documents_are_written_under_the_names_that_others_look_for(tmp_path: Path) -> None:
    artifact = initrd(tmp_path)
    written = documents(artifact, builder=BUILDER, when=WHEN, source=SOURCE)
    assert {document.file: document.media_type for document in written} == {
        "sbom.cdx.json": "application/vnd.cyclonedx+json",
        "provenance.json": "application/vnd.in-toto+json",
    }
    assert written[SBOM] == sbom(artifact, when=WHEN)
