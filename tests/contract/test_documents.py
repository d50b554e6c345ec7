"""The documents of files that were really provisioned: complete, valid, and the same whoever writes them."""

from __future__ import annotations

import hashlib
import io
import json
import stat
import time
import zlib
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.spdx import is_expression, is_supported_id
from cyclonedx.validation.json import JsonStrictValidator

from systemfiles.content.artifacts import MODULES, Artifact, Artifacts
from systemfiles.content.packaging import PROVENANCE, SBOM
from systemfiles.foundation import cpioreader
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.paths import INITRD, KERNEL, Paths
from systemfiles.release.documents import documents
from tests.conftest import ARCHES, Provisioned

BUILDER = "https://ci.example.com/systemfiles"
WHEN = 1_700_000_000


def artifacts(provisioned: Provisioned, arch: str) -> tuple[Artifact, Artifact]:
    """The kernel and the initrd of one architecture."""
    files = provisioned.boot_files(arch)
    known = Artifacts(Paths(provisioned.data_dir))
    kernel = known.load(KERNEL, files.kernel.version, Arch(arch))
    return kernel, known.load(INITRD, files.initrd.version, Arch(arch))


def written(artifact: Artifact) -> tuple[dict[str, Any], dict[str, Any]]:
    """The SBOM and the statement of `artifact`."""
    found = documents(artifact, builder=BUILDER, when=WHEN, source=None)
    return json.loads(found[SBOM]), json.loads(found[PROVENANCE])


def inner(sbom: dict[str, Any]) -> list[dict[str, Any]]:
    return [file for component in sbom["components"] for file in component.get("components", ())]


@pytest.mark.parametrize("arch", ARCHES)
def test_cyclonedx_takes_the_sboms_of_a_real_pair(provisioned: Provisioned, arch: str) -> None:
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    for artifact in artifacts(provisioned, arch):
        raw = documents(artifact, builder=BUILDER, when=WHEN, source=None)[SBOM].decode()
        assert validator.validate_str(raw) is None


@pytest.mark.parametrize("arch", ARCHES)
def test_every_file_of_a_real_initrd_is_listed_once_with_its_digest(provisioned: Provisioned, arch: str) -> None:
    _, initrd = artifacts(provisioned, arch)
    archive = zlib.decompress(initrd.path.read_bytes(), zlib.MAX_WBITS | 16)
    expected = [
        (record.name, hashlib.sha256(record.data).hexdigest())
        for record in cpioreader.read(io.BytesIO(archive))
        if record.type == stat.S_IFREG and isinstance(record.data, bytes)
    ]
    listed = [
        (place["location"], file["hashes"][0]["content"])
        for file in inner(written(initrd)[0])
        for place in file["evidence"]["occurrences"]
    ]
    assert sorted(listed) == sorted(expected)


@pytest.mark.parametrize("arch", ARCHES)
def test_the_licence_of_every_module_of_a_real_kernel_is_known(provisioned: Provisioned, arch: str) -> None:
    for artifact in artifacts(provisioned, arch):
        modules = [file for file in inner(written(artifact)[0]) if file["type"] == "library"]
        assert len(modules) > 10
        for module in modules:
            (licence,) = module["licenses"]
            expression = licence.get("expression", "GPL-2.0-only").replace("LicenseRef-BSD", "0BSD")
            assert is_expression(expression)
            assert is_supported_id(licence.get("license", {"id": "GPL-2.0-only"})["id"])


@pytest.mark.parametrize("arch", ARCHES)
def test_a_real_initrd_says_of_which_kernels_modules_it_is(provisioned: Provisioned, arch: str) -> None:
    kernel, initrd = artifacts(provisioned, arch)
    modules = written(initrd)[1]["predicate"]["buildDefinition"]["resolvedDependencies"][-1]
    made = {subject["name"]: subject["digest"] for subject in written(kernel)[1]["subject"]}
    assert modules["digest"] == made[modules["name"]]
    (part,) = (part for part in written(initrd)[0]["components"] if part["name"] == MODULES)
    assert part["hashes"][0]["content"] == modules["digest"]["sha256"]
    inside = {file["bom-ref"]: file["hashes"] for file in inner(written(kernel)[0])}
    assert all(inside[file["bom-ref"]] == file["hashes"] for file in part["components"])


def test_the_documents_of_a_real_kernel_are_small_and_soon_written(provisioned: Provisioned) -> None:
    kernel, _ = artifacts(provisioned, "x86_64")
    started = time.process_time()
    found = documents(kernel, builder=BUILDER, when=WHEN, source=None)
    assert time.process_time() - started < 10
    assert len(found[SBOM]) < 600_000
    assert len(found[PROVENANCE]) < 4_000
