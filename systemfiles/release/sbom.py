"""SBOMs: what is inside a kernel or an initrd, where each part came from, and its licence, as CycloneDX 1.6 JSON.

::

    metadata.component       the artifact, with the sha256 of the file a VMM is given
    components               what it was made from; within each of them
      components             the files in the artifact that come from it
    dependencies             the artifact needs all of the outer ones

An initrd is of busybox (a package or an image), the init script, modules of one kernel, and what the recipe adds (the
`tree`); each regular file of the archive is listed once, below one of them, with its names as occurrences. A kernel is
of one package or file, and its modules.tar lists the modules, each with its path as
`bom-ref`.

The same artifact always gives the same bytes: the serial number is a UUID made of the digests, the time is the
caller's, references are paths, and keys and components are sorted. 1.6 and not what the library has as its newest:
its readers are everywhere, and an update of the library must not change documents.

Licences are those the parts declare. A module's MODULE_LICENSE tells no variant of BSD or MPL, and nothing of "or
later"; see Linux Documentation/process/license-rules.rst, "MODULE_LICENSE", which says what its words mean.

Sources: CycloneDX 1.6 (ECMA-424); SPDX licence list and expressions; RFC 9562 for the UUID. Importing this takes a
while (cyclonedx-python-lib): import it where it is used.
"""

from __future__ import annotations

import io
import json
import stat
import tarfile
import uuid
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote_from_bytes

from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, Property, XsUri
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.component_evidence import ComponentEvidence, Occurrence
from cyclonedx.model.dependency import Dependency
from cyclonedx.model.license import DisjunctiveLicense, License, LicenseExpression
from cyclonedx.model.tool import ToolRepository
from cyclonedx.output.json import JsonV1Dot6

from systemfiles.content.artifacts import MODULES, Artifact
from systemfiles.content.descriptors import canonical
from systemfiles.foundation import cpioreader
from systemfiles.foundation.archive import BadStream
from systemfiles.foundation.cpio import Record, normalise
from systemfiles.foundation.digest import Digest, hash_file
from systemfiles.foundation.errors import DigestMismatch, IntegrityError, InvalidArchive, require_fault_of_file
from systemfiles.foundation.paths import KERNEL
from systemfiles.foundation.unpack import Compression, Packed, unpacked
from systemfiles.recipes.initrd import CONTENT_LIMITS
from systemfiles.recipes.modinfo import modinfo_section, module_name
from systemfiles.recipes.tars import Header, intact, read_member
from systemfiles.release.origins import BUSYBOX, INIT, Origin, origins, told
from systemfiles.version import __version__

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "urn:systemfiles:sbom")
_CONSEQUENCE = "no SBOM of it was written"
_TREE = "tree"
_ROOT = "lib/modules/"
_SUFFIX = ".ko"
_TEXT_MAX = 200  # characters of a licence in its own words

GPL = "GPL-2.0-only"
_OURS = "Apache-2.0"
_LINUX = f"{GPL} WITH Linux-syscall-note"
_LICENCES = {
    "GPL": GPL,
    "GPL v2": GPL,
    "GPL and additional rights": f"{GPL} OR MIT",
    "Dual MIT/GPL": f"{GPL} OR MIT",
    "Dual BSD/GPL": f"{GPL} OR LicenseRef-BSD",
    "Dual MPL/GPL": f"{GPL} OR LicenseRef-MPL",
}


def sbom(artifact: Artifact, *, when: int) -> bytes:
    """The bill of materials of `artifact`, whose files are read. `when` is in seconds since 1970 (UTC).

    Raises IntegrityError for files or a record that are not what they should be, InvalidArchive.
    """
    main = _main(artifact)
    parts = _kernel_parts(artifact) if artifact.kind == KERNEL else _initrd_parts(artifact)
    tool = Component(name="systemfiles", version=__version__, type=ComponentType.APPLICATION, licenses=_licence(_OURS))
    bom = Bom(
        serial_number=uuid.uuid5(_NAMESPACE, "\n".join(artifact.sums)),
        metadata=BomMetaData(
            timestamp=datetime.fromtimestamp(when, UTC), component=main, tools=ToolRepository(components=[tool])
        ),
        components=parts,
        dependencies=[Dependency(main.bom_ref, dependencies=[Dependency(part.bom_ref) for part in parts])],
    )
    return canonical(_in_order(json.loads(JsonV1Dot6(bom).output_as_string())))


def _in_order(value: Any) -> Any:
    """`value` with every list sorted: none of them has an order, and the library's may be that of addresses."""
    if isinstance(value, dict):
        return {key: _in_order(item) for key, item in value.items()}
    return sorted(map(_in_order, value), key=canonical) if isinstance(value, list) else value


def _main(artifact: Artifact) -> Component:
    kernel = artifact.kind == KERNEL
    facts = {"arch": artifact.arch.value, "file": artifact.file}
    for key in ("release", "content_sha256", "compressor", "requires_kernel"):
        if (value := told(artifact, key)) is not None:
            facts[key] = value
    return Component(
        type=ComponentType.OPERATING_SYSTEM,
        name="linux" if kernel else artifact.kind,
        version=artifact.version,
        bom_ref=_ref("artifact", "/".join((artifact.kind, artifact.version, artifact.arch.value))),
        hashes=_sha256(artifact.files[artifact.file].sha256),
        licenses=_licence(_LINUX) if kernel else (),
        properties=[Property(name=f"systemfiles:{key}", value=value) for key, value in facts.items()],
    )


def _kernel_parts(artifact: Artifact) -> list[Component]:
    origin = origins(artifact)[KERNEL]
    parts = [_part(KERNEL, origin, ComponentType.OPERATING_SYSTEM, _LINUX)]
    if MODULES in artifact.files:
        sha256 = artifact.files[MODULES].sha256
        modules = Origin(MODULES, artifact.version, sha256)
        files = [_file([path], data) for path, data in _members(artifact.directory / MODULES, sha256)]
        parts.append(_part(MODULES, modules, ComponentType.FILE, GPL, files))
    return parts


def _initrd_parts(artifact: Artifact) -> list[Component]:
    known = origins(artifact)
    inside: dict[str, list[Component]] = {role: [] for role in (*known, _TREE)}
    for names, data in _archived(_content(artifact)):
        inside[_owner(names[0], known)].append(_file(names, data, located=True))
    parts = [
        _part(BUSYBOX, known[BUSYBOX], ComponentType.APPLICATION, GPL, inside[BUSYBOX]),
        _part(INIT, known[INIT], ComponentType.APPLICATION, _OURS, inside[INIT]),
    ]
    if MODULES in known:
        parts.append(_part(MODULES, known[MODULES], ComponentType.FILE, GPL, inside[MODULES]))
        tree = Component(
            type=ComponentType.DATA,
            name="systemfiles-tree",
            version=told(artifact, "inputs", "tree"),
            bom_ref=_ref("part", _TREE),
            description="what the recipe adds: the index of the modules, and which of them are loaded",
            licenses=_licence(_OURS),
            components=inside[_TREE],
        )
        parts.append(tree)
    return parts


def _owner(path: str, known: Iterable[str]) -> str:
    """From which part a file of an initrd comes."""
    if path == INIT:
        return INIT
    if MODULES in known and path.startswith(_ROOT):
        return MODULES if path.endswith(_SUFFIX) else _TREE
    return _TREE if MODULES in known and path == "etc/modules" else BUSYBOX


def _part(
    role: str, origin: Origin, kind: ComponentType, licence: str, components: Iterable[Component] = ()
) -> Component:
    places = []
    if origin.url:
        place = ExternalReference(
            type=ExternalReferenceType.DISTRIBUTION, url=XsUri(origin.url), hashes=_sha256(origin.sha256)
        )
        places.append(place)
    return Component(
        type=kind,
        name=origin.name,
        version=origin.version,
        bom_ref=_ref("part", role),
        purl=origin.purl,
        hashes=_sha256(origin.sha256),
        licenses=_licence(licence),
        external_references=places,
        description="added by hand" if role == KERNEL and origin.purl is None else None,
        components=components,
    )


def _file(names: list[str], data: bytes, *, located: bool = False) -> Component:
    """One regular file and, where it is a module, what it says of itself."""
    path = _printable(names[0])
    module = names[0].startswith(_ROOT) and names[0].endswith(_SUFFIX)
    places = [Occurrence(location=_printable(name)) for name in names] if located else ()
    return Component(
        type=ComponentType.LIBRARY if module else ComponentType.FILE,
        name=module_name(path) if module else path,
        bom_ref=_ref("file", names[0]),
        hashes=_sha256(Digest.of(data).hex),
        licenses=_declared(data, path) if module else (),
        evidence=ComponentEvidence(occurrences=places) if places else None,
    )


def _declared(module: bytes, path: str) -> list[License]:
    """What a module declares; of several, which parts of one may do, all hold. Nothing where that cannot be read."""
    try:
        section = modinfo_section(module, path)
    except InvalidArchive:
        return []
    items = (item.partition(b"=") for item in section.split(b"\0"))
    words = sorted(
        {_printable(value.decode("utf-8", "surrogateescape")) for key, _, value in items if key == b"license"}
    )
    words = [word for word in words if word]
    if all(word in _LICENCES for word in words):
        found = sorted({_LICENCES[word] for word in words})
        return _licence(" AND ".join(f"({one})" if len(found) > 1 and " " in one else one for one in found))
    return [DisjunctiveLicense(name=" and ".join(words)[:_TEXT_MAX])]


def _licence(expression: str) -> list[License]:
    if not expression:
        return []
    return [LicenseExpression(expression) if " " in expression else DisjunctiveLicense(id=expression)]


def _ref(kind: str, name: str) -> str:
    """What nothing else in the document is called: the library would make up another for a second one, at random."""
    return f"{kind}:{quote_from_bytes(name.encode('utf-8', 'surrogateescape'), safe='/+@:=,~')}"


def _sha256(hexadecimal: str) -> list[HashType]:
    return [HashType(alg=HashAlgorithm.SHA_256, content=hexadecimal)]


def _printable(text: str) -> str:
    """`text` with what is not UTF-8, or does not print, escaped as in Python."""
    whole = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in whole)


def _content(artifact: Artifact) -> bytes:
    """The uncompressed archive of an initrd, which is the one on record."""
    path, facts = artifact.path, artifact.files[artifact.file]
    packed = _read(path, facts.size + 1)
    _expect(path, facts.sha256, Digest.of(packed))
    try:
        source = Packed(io.BytesIO(packed), length=len(packed))
        content = b"".join(unpacked(source, Compression.GZIP, CONTENT_LIMITS))
    except BadStream as error:
        raise InvalidArchive(path, f"its compressed data is damaged ({error})") from error
    _expect(path, str(artifact.record["content_sha256"]), Digest.of(content))
    return content


def _archived(content: bytes) -> Iterator[tuple[list[str], bytes]]:
    """The regular files of an archive with all their names, sorted."""
    files: dict[str, tuple[list[str], Record]] = {}
    for record in normalise(cpioreader.read(io.BytesIO(content))):
        if record.type == stat.S_IFREG:
            files.setdefault(record.hardlink or record.name, ([], record))[0].append(record.name)
    for names, record in files.values():
        assert isinstance(record.data, bytes)  # as all that is read
        yield names, record.data


def _members(path: Path, sha256: str) -> Iterator[tuple[str, bytes]]:
    """The regular files of a modules.tar, which is the one on record."""
    try:
        _expect(path, sha256, hash_file(path)[0])
        with intact(path), tarfile.open(path, "r:", tarinfo=Header) as archive:
            seen = set()
            for member in archive:
                if member.name in seen:
                    raise InvalidArchive(path, f"the name {member.name!r:.200} occurs twice")
                seen.add(member.name)
                if member.isreg():
                    yield member.name, read_member(archive, member)
    except OSError as error:
        _unreadable(path, error)


def _read(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(most)
    except OSError as error:
        _unreadable(path, error)


def _unreadable(path: Path, error: OSError) -> NoReturn:
    require_fault_of_file(error, path)
    raise IntegrityError(path, expected="a file", got=error.strerror, consequence=_CONSEQUENCE) from error


def _expect(path: Path, sha256: str, got: Digest) -> None:
    if (expected := Digest.from_hex(sha256)) != got:
        raise DigestMismatch(path, expected=expected, got=got, consequence=_CONSEQUENCE)
