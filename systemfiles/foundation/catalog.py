"""versions.toml: what exists, where it comes from, which are the defaults.

The shipped catalog is overlaid, entry by entry, by /etc/systemfiles/versions.toml and then by the file that the caller
or `$SYSTEMFILES_CATALOG` names. Every fault of a file is reported at once, with its key path and, where it can be
told, its line.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from systemfiles.foundation.arch import Arch, is_arch
from systemfiles.foundation.errors import CatalogError, InvalidName, UnknownVersion, UnsupportedArch
from systemfiles.foundation.paths import INITRD, KERNEL, VERSION_RULE, check_version

SYSTEM_CATALOG = Path("/etc/systemfiles/versions.toml")
MIRRORS_VARIABLE = "SYSTEMFILES_MIRRORS"
REGISTRY_VARIABLE = "SYSTEMFILES_REGISTRY"
PROFILE = "profile"
_LONGEST_CATALOG = 256 << 10
_LONGEST_LINE = 1000  # a dotted key takes tomllib time quadratic in its length


class CatalogModel(BaseModel):
    """What every table of versions.toml and versions.lock is: frozen, and without keys nobody knows."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _parse_arch(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return Arch.parse(value)
    except UnsupportedArch as error:
        raise ValueError(error.summary) from None


def _distinct(value: object) -> object:
    """Refuses one architecture under two of its names, of which one would silently win."""
    if isinstance(value, dict):
        known = [Arch.parse(key).value for key in value if isinstance(key, str) and is_arch(key)]
        if twice := sorted({name for name in known if known.count(name) > 1}):
            msg = f"names {', '.join(twice)} twice"
            raise ValueError(msg)
    return value


def _version(value: str) -> str:
    try:
        return check_version("", value)
    except InvalidName:
        msg = f"is not a version name; allowed: {VERSION_RULE}"
        raise ValueError(msg) from None


ArchKey = Annotated[Arch, BeforeValidator(_parse_arch)]
VersionName = Annotated[str, AfterValidator(_version)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Url = Annotated[str, StringConstraints(pattern=r"^(https?://|file:/)[^\s]+$")]
Package = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9+.-]+$")]
Module = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]
_REGISTRY = r"^(http://)?(localhost|[A-Za-z0-9-]*[.:][A-Za-z0-9.:-]*|\[[0-9a-fA-F:]+\](:[0-9]+)?)(/[a-z0-9._-]+)*$"
Registry = Annotated[str, StringConstraints(pattern=_REGISTRY)]
TrustedKey = Annotated[str, StringConstraints(pattern=r"^(\s*-----BEGIN |/)")]
KeyId = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
PinnedReference = Annotated[str, StringConstraints(pattern=r"^[^\s@]+/[^\s@]+@sha256:[0-9a-f]{64}$")]


class KernelFile(CatalogModel):
    """One file to download: `size` in bytes is checked when it is given."""

    url: Url
    sha256: Sha256
    size: Annotated[int, Field(gt=0)] | None = None


class Kernel(CatalogModel):
    """A kernel: concrete (`files`, pinned by digest) or rolling (`apt`, a package for each architecture)."""

    summary: str = ""
    files: Annotated[dict[ArchKey, KernelFile], BeforeValidator(_distinct)] = {}
    apt: Annotated[dict[ArchKey, Package], BeforeValidator(_distinct)] = {}

    @model_validator(mode="after")
    def _has_one_source(self) -> Kernel:
        if bool(self.files) == bool(self.apt):
            msg = "needs either 'files' (a concrete version) or 'apt' (a rolling one)"
            raise ValueError(msg)
        return self

    @property
    def rolling(self) -> bool:
        return bool(self.apt)

    @property
    def arches(self) -> tuple[Arch, ...]:
        return tuple(self.files or self.apt)


class AptBusybox(CatalogModel):
    """A busybox from the host's distribution, statically linked; rolling."""

    apt: Package


class Initrd(CatalogModel):
    """An initrd: an init script, a busybox, and the modules to take from a modular kernel.

    `load` names the modules that /init loads before it looks for disks, `carry` those that are there when asked for.
    """

    summary: str = ""
    init: VersionName
    busybox: PinnedReference | AptBusybox
    load: tuple[Module, ...] = ()
    carry: tuple[Module, ...] = ()

    @property
    def rolling(self) -> bool:
        return isinstance(self.busybox, AptBusybox) or bool(self.load or self.carry)


class Profile(CatalogModel):
    """A named pair of defaults."""

    summary: str = ""
    kernel: VersionName
    initrd: VersionName


class Retention(CatalogModel):
    """What a collection leaves although nothing holds it: what is younger than `grace` seconds, the `keep_last` newest
    kernels and initrds of each architecture, and other content up to `max_cache_bytes`."""

    grace: Annotated[int, Field(ge=0)] = 24 * 3600
    keep_last: Annotated[int, Field(ge=0)] = 2
    max_cache_bytes: Annotated[int, Field(ge=0)] | None = None


class Trust(CatalogModel):
    """Whose signatures artifacts from a registry must have: of one of `keys`, each a public key in PEM or the
    absolute path of one, and of none whose id is `revoked`."""

    keys: Annotated[tuple[TrustedKey, ...], Field(min_length=1)]
    revoked: tuple[KeyId, ...] = ()


class Catalog(CatalogModel):
    """All that versions.toml and its overlays say."""

    schema_version: Literal[1] = Field(alias="schema")
    default_profile: str | None = None
    profile: dict[VersionName, Profile] = {}
    kernel: dict[VersionName, Kernel] = {}
    initrd: dict[VersionName, Initrd] = {}
    mirrors: dict[str, tuple[str, ...]] = {}
    registries: tuple[Registry, ...] = ()
    build: StrictBool | None = None
    """Whether what no registry has is fetched from its origin and built here; None is yes."""
    trust: Trust | None = None
    retention: Retention | None = None

    @field_validator("mirrors")
    @classmethod
    def _has_mirrors(cls, mirrors: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for prefix, places in mirrors.items():
            for fault in filter(None, (_mirror_fault(prefix, place) for place in places)):
                msg = f"{prefix}: {fault}"
                raise ValueError(msg)
        return mirrors

    def find_profile(self, name: str | None) -> Profile:
        """The profile called `name`, or the default one. Raises UnknownVersion."""
        wanted = (self.default_profile or "") if name is None else name
        if wanted not in self.profile:
            raise UnknownVersion(PROFILE, wanted, known=self.profile)
        return self.profile[wanted]

    def find_kernel(self, name: str, arch: Arch) -> Kernel:
        """The kernel entry called `name`. Raises UnknownVersion, UnsupportedArch."""
        if name not in self.kernel:
            raise UnknownVersion(KERNEL, name, known=self.kernel)
        entry = self.kernel[name]
        if arch not in entry.arches:
            raise UnsupportedArch(arch.value, supported=map(str, entry.arches), subject=f"kernel {name}")
        return entry

    def find_initrd(self, name: str) -> Initrd:
        """The initrd entry called `name`. Raises UnknownVersion."""
        if name not in self.initrd:
            raise UnknownVersion(INITRD, name, known=self.initrd)
        return self.initrd[name]


def shipped_catalog() -> Path:
    """The catalog of this release: inside the wheel, or at the top of the checkout."""
    package = Path(__file__).parent.parent
    inside = package / "versions.toml"
    return inside if inside.exists() else package.parent / "versions.toml"


def load_catalog(overlay: Path | None = None, *, environ: Mapping[str, str] = os.environ) -> Catalog:
    """The shipped catalog under its overlays. Raises CatalogError with every fault of the first faulty file."""
    chosen = overlay or (Path(environ["SYSTEMFILES_CATALOG"]) if environ.get("SYSTEMFILES_CATALOG") else None)
    layers = [read_catalog(shipped_catalog())]
    if SYSTEM_CATALOG.exists():
        layers.append(read_catalog(SYSTEM_CATALOG))
    if chosen is not None:
        layers.append(read_catalog(chosen))
    merged = _merge(layers, environ)
    if faults := tuple(_dangling(merged)):
        raise CatalogError(chosen or "the catalog", faults)
    return merged


def read_catalog(path: Path) -> Catalog:
    """One file, validated by itself. Raises CatalogError."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(_LONGEST_CATALOG + 1)
    except OSError as error:
        raise CatalogError(path, [("file", error.strerror or str(error))]) from error
    if len(raw) > _LONGEST_CATALOG:
        raise CatalogError(path, [("file", f"is longer than the {_LONGEST_CATALOG} bytes that are read")])
    try:
        text = raw.decode()
        _require_short_lines(text, path)
        return Catalog.model_validate(tomllib.loads(text))
    except ValidationError as error:
        raise CatalogError(path, _faults(error, text)) from None
    except (ValueError, RecursionError) as error:  # not UTF-8, or not TOML
        raise CatalogError(path, [("syntax", str(error))]) from None


def _require_short_lines(text: str, path: Path) -> None:
    for number, line in enumerate(text.split("\n"), 1):
        if len(line) > _LONGEST_LINE:
            raise CatalogError(path, [(f"line {number}", f"is longer than {_LONGEST_LINE} characters")])


def _merge(layers: list[Catalog], environ: Mapping[str, str]) -> Catalog:
    merged: dict[str, Any] = {"schema": 1, "mirrors": _environment_mirrors(environ)}
    for table in ("profile", "kernel", "initrd"):
        merged[table] = {name: entry for layer in layers for name, entry in getattr(layer, table).items()}
    for registry in environ.get(REGISTRY_VARIABLE, "").split():
        if not re.match(_REGISTRY, registry):
            expected = "expected a host and a path, such as registry.example.com/systemfiles"
            raise CatalogError(REGISTRY_VARIABLE, [(registry[:200], expected)])
    merged["registries"] = [
        *environ.get(REGISTRY_VARIABLE, "").split(),
        *(registry for layer in reversed(layers) for registry in layer.registries),
    ]
    for name in ("retention", "trust", "build"):
        told = (getattr(layer, name) for layer in reversed(layers))
        merged[name] = next((value for value in told if value is not None), None)
    merged["default_profile"] = next(layer.default_profile for layer in reversed(layers) if layer.default_profile)
    for layer in reversed(layers):
        for prefix, mirrors in layer.mirrors.items():
            merged["mirrors"][prefix] = (*merged["mirrors"].get(prefix, ()), *mirrors)
    return Catalog.model_validate(merged)


def _environment_mirrors(environ: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    mirrors: dict[str, tuple[str, ...]] = {}
    for pair in environ.get(MIRRORS_VARIABLE, "").split():
        prefix, separator, mirror = pair.partition("=")
        if not (prefix and separator and mirror):
            raise CatalogError(MIRRORS_VARIABLE, [(pair, "expected prefix=mirror, pairs separated by spaces")])
        if fault := _mirror_fault(prefix, mirror):
            raise CatalogError(MIRRORS_VARIABLE, [(prefix, fault)])
        mirrors[prefix] = (*mirrors.get(prefix, ()), mirror)
    return mirrors


def _mirror_fault(prefix: str, mirror: str) -> str | None:
    """What is wrong with a mirror, without its text: there may be a password in it."""
    if re.match(r"[a-z+]+://[^/]*@", mirror):
        return "its mirror has a user in it; credentials go into $SYSTEMFILES_CREDENTIALS, docker's config or netrc"
    if "," in mirror:
        return "its mirror has a comma in it; pairs are separated by spaces"
    if "://" in prefix and not re.match(r"https?://|file:/", mirror):
        return "its mirror is no URL; expected http://, https:// or file:/"
    if "://" not in prefix and mirror.startswith("https://"):
        return "a mirror of images is written without https://"
    return None


def _dangling(catalog: Catalog) -> Iterator[tuple[str, str]]:
    """Names that refer to nothing."""
    if catalog.default_profile not in catalog.profile:
        yield "default_profile", f"there is no profile {catalog.default_profile!r}"
    for name, profile in catalog.profile.items():
        if profile.kernel not in catalog.kernel:
            yield f"profile.{name}.kernel", f"there is no kernel {profile.kernel!r}"
        if profile.initrd not in catalog.initrd:
            yield f"profile.{name}.initrd", f"there is no initrd {profile.initrd!r}"


def _faults(error: ValidationError, text: str) -> list[tuple[str, str]]:
    lines = _lines_of_keys(text)
    faults = []
    for fault in error.errors(include_url=False):
        path = tuple(str(part) for part in fault["loc"] if part != "[key]")
        known = next((path[:n] for n in range(len(path), 0, -1) if path[:n] in lines), None)
        where = ".".join(path) or "file"
        what = fault["msg"].removeprefix("Value error, ")
        faults.append((f"line {lines[known]}, {where}" if known else where, what))
    return faults


def _lines_of_keys(text: str) -> dict[tuple[str, ...], int]:
    """The line of each `[table]` and of each `key =` at the start of a line; tomllib itself tells no lines."""
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("["):
            table = _key_path(line) or table
            lines.setdefault(table, number)
        elif match := re.match(r"\s*([^=#\[]+?)\s*=", line):
            lines.setdefault((*table, *_key_path(f"{match[1]} = 0")), number)
    return lines


def _key_path(line: str) -> tuple[str, ...]:
    try:
        value: Any = tomllib.loads(line)
    except tomllib.TOMLDecodeError:
        return ()
    path = []
    while isinstance(value, dict) and value:
        key, value = next(iter(value.items()))
        path.append(key)
    return tuple(path)
