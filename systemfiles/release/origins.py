"""What an artifact was made from, by its own record: what its SBOM lists and its provenance resolves.

A record names its origins as provisioning knew them: a package file of a distribution, an image by its digest, a
download, or a file that someone added. Here each gets what the world knows it by, a package URL, and loses what is
nobody's business: credentials in a URL, and paths of the host in place of one.

Sources: the package-url specification (ECMA-427) and its types deb, oci and generic.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn
from urllib.parse import urlsplit

from systemfiles.content.artifacts import MODULES, Artifact
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import IntegrityError, InvalidDigest, UsageError
from systemfiles.foundation.lockfile import PackagePin
from systemfiles.foundation.paths import KERNEL
from systemfiles.foundation.units import public_url

if TYPE_CHECKING:
    from packageurl import PackageURL

    from systemfiles.foundation.catalog import KernelFile

BUSYBOX = "busybox"
INIT = "init"

_RELEASE_OF_DEBIAN = re.compile(r"[+~](?:deb|bpo)(?P<number>[1-9][0-9]*)")


class Origin(NamedTuple):
    """One thing an artifact was made from.

    `sha256` (hex) is of its file, or of the manifest or index of an image. `purl` is None for a file that was added by
    hand, and `url` also for whatever cannot be fetched from elsewhere.
    """

    name: str
    version: str
    sha256: str
    purl: PackageURL | None = None
    url: str | None = None


def origins(artifact: Artifact) -> dict[str, Origin]:
    """What `artifact` was made from: of a kernel its "kernel"; of an initrd "busybox", "init", perhaps "modules.tar".

    Raises IntegrityError when the record does not tell.
    """
    try:
        return {KERNEL: _kernel(artifact)} if artifact.kind == KERNEL else _initrd(artifact)
    except (KeyError, TypeError, ValueError, InvalidDigest, UsageError):
        _refuse(artifact, "what it was made from")


def told(artifact: Artifact, *keys: str) -> str | None:
    """A text or a whole number of the record, as text; None when it has none there. Raises IntegrityError.

    It is going to be published: a control character or half a surrogate pair is refused.
    """
    value: Any = artifact.record
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).isprintable():
        _refuse(artifact, f"a printable text as {'.'.join(keys)}")
    return str(value)


def _kernel(artifact: Artifact) -> Origin:
    from systemfiles.provision.kernels import source_on_record

    source = source_on_record(artifact.record)
    if isinstance(source, PackagePin):
        return _package(source, artifact.arch)
    if source is None:  # taken in by hand; under which name is for the host alone to know
        return Origin("kernel file", artifact.version, _sha256(artifact.inputs["sha256"]))
    return _download(source, artifact.version)


def _initrd(artifact: Artifact) -> dict[str, Origin]:
    from systemfiles.provision.initrdpins import pin_on_record

    pin = pin_on_record(artifact.record)
    if pin is None:
        _refuse(artifact, "what it was made from")
    found = {
        BUSYBOX: _package(pin.busybox, artifact.arch) if isinstance(pin.busybox, PackagePin) else _image(pin.busybox),
        INIT: Origin(INIT, pin.init, _sha256(pin.inputs["init"]["sha256"]), _generic("systemfiles-init", pin.init)),
    }
    if pin.kernel is not None:
        purl = _generic("systemfiles-kernel", pin.kernel, subpath=MODULES, arch=artifact.arch.value)
        found[MODULES] = Origin(MODULES, pin.kernel, _sha256(pin.inputs["kernel"]["modules"]), purl)
    return found


def _package(pin: PackagePin, arch: Arch) -> Origin:
    from packageurl import PackageURL

    url = public_url(pin.url)
    vendor = "ubuntu" if "ubuntu" in pin.version or "/ubuntu" in (url or "") else "debian"
    qualifiers = {"arch": arch.debian}
    if vendor == "debian" and (release := _RELEASE_OF_DEBIAN.search(pin.version)):
        qualifiers["distro"] = f"debian-{release['number']}"
    return Origin(
        pin.package, pin.version, pin.sha256, PackageURL("deb", vendor, pin.package, pin.version, qualifiers), url
    )


def _image(reference: str) -> Origin:
    from packageurl import PackageURL

    from systemfiles.sources.oci import Reference

    image = Reference.parse(reference)
    digest = Digest.parse(str(image.digest))
    name = image.repository.rpartition("/")[2]
    qualifiers = {"repository_url": f"{image.registry}/{image.repository}", **({"tag": image.tag} if image.tag else {})}
    purl = PackageURL("oci", None, name, str(digest), qualifiers)
    return Origin(name, image.tag or digest, digest.hex, purl)


def _download(source: KernelFile, version: str) -> Origin:
    url = public_url(source.url)
    name = urlsplit(source.url).path.rpartition("/")[2]
    name = name if name and name.isprintable() else KERNEL
    place = {"download_url": url} if url else {}
    return Origin(
        name, version, source.sha256, _generic(name, version, checksum=f"sha256:{source.sha256}", **place), url
    )


def _generic(name: str, version: str, *, subpath: str | None = None, **qualifiers: str) -> PackageURL:
    from packageurl import PackageURL

    return PackageURL("generic", None, name, version, qualifiers or None, subpath)


def _sha256(text: object) -> str:
    return Digest.from_hex(str(text)).hex


def _refuse(artifact: Artifact, expected: str) -> NoReturn:
    subject = f"the record of {artifact.kind} {artifact.version} ({artifact.arch})"
    raise IntegrityError(
        subject,
        expected=expected,
        got="something else",
        consequence="no document about it was written",
    )
