"""Provenance: every input by its digest, in the form that in-toto and SLSA define, always in the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format  # type: ignore[import-untyped]
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2  # type: ignore[import-untyped]
from in_toto_attestation.v1 import statement_pb2  # type: ignore[import-untyped]
from in_toto_attestation.v1.statement import Statement  # type: ignore[import-untyped]

from systemfiles.content.artifacts import MODULES, Artifact, FileFacts
from systemfiles.content.packaging import PROVENANCE
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.errors import IntegrityError, UsageError
from systemfiles.release.provenance import PREDICATE_TYPE, STATEMENT_TYPE, provenance
from systemfiles.version import __version__

NOWHERE = Path("nothing-is-read-from-here")
BUILDER = "https://ci.example.com/systemfiles"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SOURCE = f"git+https://git.example.com/systemfiles.git@{COMMIT}"
WHEN = 1_700_000_000
BOOT, MODULES_SHA, PACKAGE, SCRIPT, IMAGE = ("a" * 64, "b" * 64, "c" * 64, "d" * 64, "e" * 64)
DEB = {
    "package": "linux-image-6.1.0-56-cloud-amd64",
    "version": "6.1.192-2",
    "url": "https://deb.example.com/debian/linux-image.deb",
    "size": 5,
    "sha256": PACKAGE,
}
BUSYBOX = {
    "package": "busybox-static",
    "version": "1:1.35.0-4+deb12u1+b1",
    "url": "https://deb.example.com/debian/busybox-static_1.35.0-4%2bdeb12u1%2bb1_amd64.deb",
    "size": 6,
    "sha256": PACKAGE,
}


def kernel(source: object, **inputs: str) -> Artifact:
    files = {"vmlinux": FileFacts(BOOT, 1), MODULES: FileFacts(MODULES_SHA, 2)}
    record = {"inputs": {"sha256": PACKAGE, **inputs}, "source": source, "release": "6.1.0-56-cloud-amd64"}
    return Artifact("kernel", "linux-1", Arch.X86_64, NOWHERE, files, record)


def initrd(busybox: object, **changes: object) -> Artifact:
    inputs = {
        "tree": 2,
        "init": {"version": "v1.0.0", "sha256": SCRIPT},
        "busybox": {},
        "kernel": {"modules": MODULES_SHA},
        "load": ["virtio_blk"],
        "carry": ["erofs"],
    }
    record = {
        "inputs": inputs,
        "source": {"busybox": busybox},
        "requires_kernel": "linux-1",
        "compressor": "zlib 1.2.13 level 9",
        **changes,
    }
    return Artifact("initrd", "v1-abc", Arch.AARCH64, NOWHERE, {"initrd": FileFacts(BOOT, 1)}, record)


def predicate(artifact: Artifact, source: str | None = None) -> dict[str, Any]:
    statement = json.loads(provenance(artifact, builder=BUILDER, when=WHEN, source=source))
    found: dict[str, Any] = statement["predicate"]
    return found


def dependencies(artifact: Artifact, source: str | None = None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = predicate(artifact, source)["buildDefinition"]["resolvedDependencies"]
    return found


@pytest.mark.parametrize("artifact", [kernel(DEB), kernel({"added_from": "x"}), initrd(BUSYBOX)])
def test_in_totos_own_library_takes_the_statement_and_knows_every_field(artifact: Artifact) -> None:
    raw = provenance(artifact, builder=BUILDER, when=WHEN, source=SOURCE)
    message = statement_pb2.Statement()
    statement = Statement.copy_from_pb(json_format.Parse(raw, message))
    statement.validate()
    assert statement.pb.type == STATEMENT_TYPE
    assert statement.pb.predicate_type == PREDICATE_TYPE

    # a field that the format does not have would be refused here
    parsed = json_format.ParseDict(json.loads(raw)["predicate"], provenance_pb2.Provenance())
    assert parsed.run_details.builder.id == BUILDER
    assert parsed.run_details.builder.version["systemfiles"] == __version__
    assert parsed.run_details.metadata.started_on.seconds == parsed.run_details.metadata.finished_on.seconds == WHEN
    assert all(dependency.digest for dependency in parsed.build_definition.resolved_dependencies)


def test_every_file_is_a_subject_under_its_name_in_sha256sums() -> None:
    artifact = kernel(DEB)
    statement = json.loads(provenance(artifact, builder=BUILDER, when=WHEN, source=None))
    assert [f"{subject['digest']['sha256']}  {subject['name']}" for subject in statement["subject"]] == artifact.sums


def test_what_was_asked_for_is_external_and_what_it_stands_for_internal() -> None:
    definition = predicate(initrd(BUSYBOX))["buildDefinition"]
    assert definition["buildType"] == "urn:systemfiles:build:initrd:v1"
    assert definition["externalParameters"] == {"kind": "initrd", "version": "v1-abc", "arch": "aarch64"}
    assert definition["internalParameters"] == {
        "compressor": "zlib 1.2.13 level 9",
        "init": "v1.0.0",
        "kernel": "linux-1",
        "tree": "2",
        "load": ["virtio_blk"],
        "carry": ["erofs"],
    }


def test_a_package_is_named_by_its_package_url_and_where_it_was() -> None:
    assert dependencies(kernel(DEB)) == [
        {
            "name": DEB["package"],
            "uri": "pkg:deb/debian/linux-image-6.1.0-56-cloud-amd64@6.1.192-2?arch=amd64",
            "downloadLocation": DEB["url"],
            "digest": {"sha256": PACKAGE},
        }
    ]


def test_an_initrd_names_its_busybox_its_init_and_the_modules_it_took() -> None:
    busybox, init, modules = dependencies(initrd(BUSYBOX))
    assert busybox["uri"] == ("pkg:deb/debian/busybox-static@1:1.35.0-4%2Bdeb12u1%2Bb1?arch=arm64&distro=debian-12")
    assert busybox["downloadLocation"] == BUSYBOX["url"]
    assert init == {"name": "init", "uri": "pkg:generic/systemfiles-init@v1.0.0", "digest": {"sha256": SCRIPT}}
    assert modules["name"] == "kernel/linux-1/aarch64/modules.tar"
    assert modules["digest"] == {"sha256": MODULES_SHA}


def test_an_image_is_named_by_its_digest() -> None:
    busybox, *_ = dependencies(initrd(f"registry.example.com/base/busybox:1.37@sha256:{IMAGE}"))
    assert busybox["digest"] == {"sha256": IMAGE}
    assert busybox["uri"] == (
        f"pkg:oci/busybox@sha256:{IMAGE}?repository_url=registry.example.com/base/busybox&tag=1.37"
    )


def test_a_package_of_ubuntu_is_not_called_debians() -> None:
    (package,) = dependencies(kernel({**DEB, "version": "6.8.0-31.31", "url": "https://example.com/ubuntu/a.deb"}))
    assert package["uri"].startswith("pkg:deb/ubuntu/")


def test_a_download_is_named_by_its_url_and_digest() -> None:
    url = "https://example.com/v6/vmlinux-x86_64"
    (download,) = dependencies(kernel({"url": url, "sha256": PACKAGE}))
    assert download["downloadLocation"] == url
    assert download["uri"].startswith("pkg:generic/vmlinux-x86_64@linux-1?checksum=sha256:cccc")


def test_a_kernel_that_was_added_by_hand_is_its_digest_and_nothing_of_the_host() -> None:
    artifact = kernel({"added_from": "bzImage-of-alice"})
    assert dependencies(artifact) == [{"name": "kernel file", "digest": {"sha256": PACKAGE}}]
    assert b"alice" not in provenance(artifact, builder=BUILDER, when=WHEN, source=None)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("https://user:secret@deb.example.com/debian/a.deb", "https://deb.example.com/debian/a.deb"),
        ("file:/srv/secret/a.deb", None),
        ("file://secret/a.deb", None),
        ("http:///secret/a.deb", None),
        ("http://[secret/a.deb", None),
    ],
)
def test_credentials_and_places_of_the_host_are_left_out(url: str, told: str | None) -> None:
    raw = provenance(kernel({**DEB, "url": url}), builder=BUILDER, when=WHEN, source=None)
    assert b"secret" not in raw
    assert dependencies(kernel({**DEB, "url": url}))[0].get("downloadLocation") == told


def test_the_commit_is_the_first_dependency() -> None:
    source, _ = dependencies(kernel(DEB), SOURCE)
    assert source == {"name": "systemfiles", "uri": SOURCE, "digest": {"gitCommit": COMMIT}}


def test_the_commit_of_a_private_repository_keeps_its_token_to_itself() -> None:
    source, _ = dependencies(kernel(DEB), f"git+https://token@git.example.com/systemfiles@{COMMIT}")
    assert source["uri"] == f"git+https://git.example.com/systemfiles@{COMMIT}"


def test_a_repository_on_this_host_is_only_its_commit() -> None:
    source, _ = dependencies(kernel(DEB), f"git+file:///home/me/systemfiles@{COMMIT}")
    assert source == {"name": "systemfiles", "digest": {"gitCommit": COMMIT}}


@pytest.mark.parametrize("source", ["", COMMIT, f"https://a/b@{COMMIT}", "git+https://a/b@main", "git+https://a/b"])
def test_a_source_that_names_no_commit_is_refused(source: str) -> None:
    with pytest.raises(UsageError):
        provenance(kernel(DEB), builder=BUILDER, when=WHEN, source=source)


@pytest.mark.parametrize("builder", ["", "me", "https:", "https://a b", "https://a\n", "https://ä"])
def test_a_builder_is_a_uri(builder: str) -> None:
    with pytest.raises(UsageError):
        provenance(kernel(DEB), builder=builder, when=WHEN, source=None)


@pytest.mark.parametrize(
    "artifact",
    [
        initrd(None),
        initrd(5),
        initrd("busybox"),
        initrd(f"a b/busybox@sha256:{IMAGE}"),
        initrd(f"UPPER.example.com/Busybox@sha256:{IMAGE}"),
        initrd(BUSYBOX, source="busybox"),
        initrd(BUSYBOX, inputs={"init": {"version": "v1"}}),
        initrd(BUSYBOX, inputs={"init": {"version": "v1", "sha256": "../"}}),
        initrd(BUSYBOX, inputs={"init": {"version": "v1", "sha256": SCRIPT}}),  # and no word of the modules
        initrd(BUSYBOX, compressor="\ud800"),
        initrd(BUSYBOX, compressor="zlib\n"),
        initrd(BUSYBOX, compressor=["zlib"]),
        initrd(BUSYBOX, compressor=True),
        kernel({"added_from": "x"}, sha256="short"),
    ],
)
def test_a_record_that_does_not_tell_is_refused(artifact: Artifact) -> None:
    with pytest.raises(IntegrityError):
        provenance(artifact, builder=BUILDER, when=WHEN, source=None)


def test_who_made_the_files_here_and_when_changes_nothing() -> None:
    one, other = (
        provenance(initrd(BUSYBOX, created_at=at, created_by=by), builder=BUILDER, when=WHEN, source=SOURCE)
        for at, by in (("2026-01-01T00:00:00Z", "systemfiles 0.0.9"), ("2026-01-02T00:00:00Z", "systemfiles 0.1.0"))
    )
    assert one == other


SCRIPT_OF_ANOTHER_PROCESS = """
import sys
from tests.unit.test_provenance import BUILDER, BUSYBOX, SOURCE, WHEN, initrd, provenance
sys.stdout.buffer.write(provenance(initrd(BUSYBOX), builder=BUILDER, when=WHEN, source=SOURCE))
"""


@pytest.mark.parametrize(("seed", "zone", "locale"), [("1", "Asia/Kathmandu", "C"), ("2", "UTC+12", "C.UTF-8")])
def test_any_process_writes_the_same_bytes(seed: str, zone: str, locale: str) -> None:
    surroundings = {**os.environ, "PYTHONHASHSEED": seed, "TZ": zone, "LC_ALL": locale}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT_OF_ANOTHER_PROCESS],
        cwd=Path(__file__).parent.parent.parent,
        env=surroundings,
        check=True,
        capture_output=True,
    )
    assert done.stdout == provenance(initrd(BUSYBOX), builder=BUILDER, when=WHEN, source=SOURCE)


def test_it_has_the_name_and_type_that_others_look_for() -> None:
    assert PROVENANCE == ("provenance.json", "application/vnd.in-toto+json", "io.systemfiles.provenance")
