"""The host's own apt, asked for packages of either architecture without touching the host's state.

apt resolves and authenticates (its sources, keys, pins and proxies apply); the bytes are fetched by `sources.http`.
It works as any user, because lists and caches live in a private directory. apt-get(8), sources.list(5).
"""

from __future__ import annotations

import logging
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from systemfiles.foundation.arch import Arch
from systemfiles.foundation.errors import SourceRefused, SourceUnavailable, ToolFailed, ToolMissing
from systemfiles.foundation.files import make_dirs
from systemfiles.foundation.process import run

log = logging.getLogger(__name__)

_NO_APT = "this profile needs a Debian or Ubuntu host; elsewhere use a profile that does not (systemfiles ls --catalog)"
_WHAT_ELSE = "check the host's apt sources and network (apt-get update), or use another profile"
_LOCATION = re.compile(r"'(?P<url>[^']+)' (?P<file>\S+) (?P<size>\d+) SHA256:(?P<sha256>[0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Package:
    """One package file of the archive: `size` in bytes, `sha256` in hex."""

    name: str
    version: str
    url: str
    size: int
    sha256: str


class Apt:
    """apt for one architecture, with its lists in `state`, which must exist and be traversable for apt's own user."""

    def __init__(self, arch: Arch, state: Path) -> None:
        self.arch = arch
        self._state = state
        self.failed_sources: tuple[str, ...] = ()
        make_dirs(state / "lists" / "partial")
        make_dirs(state / "cache" / "archives" / "partial")
        options = {
            "APT::Architecture": arch.debian,
            "APT::Architectures": arch.debian,
            "Dir::State": state,
            "Dir::State::Lists": state / "lists",
            "Dir::State::status": "/dev/null",
            "Dir::Cache": state / "cache",
            "Acquire::Languages": "none",
        }
        self._options = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]

    def update(self) -> None:
        """Fetches the package lists. Sources that fail are remembered: they matter only if a package is then missing.

        Raises ToolMissing.
        """
        try:
            # without -eany apt-get ends with 0 even when every fetch failed
            self._apt("apt-get", "update", "-eany", "-q")
        except ToolFailed as error:
            lines = [line for line in error.output.splitlines() if line.startswith(("E:", "W:", "Err:"))]
            self.failed_sources = tuple(lines) or (error.output.strip(),)
            for line in self.failed_sources:
                log.warning("apt-get update: %s", line)

    def locate(self, name: str) -> Package:
        """Where the newest eligible version of package `name` is. Raises SourceUnavailable, SourceRefused."""
        try:
            version = self._field(name, "Version")
            listing = self._apt("apt-get", "download", "--print-uris", "-q", f"{name}={version}")
        except ToolFailed as error:
            raise self._unavailable(name, error.output) from error
        found = _LOCATION.search(listing)
        if not found:
            problem = f"apt gives no SHA256 for it: {listing.strip()[:200]!r}"
            raise SourceRefused(self._subject(name), problem, hint=_WHAT_ELSE)
        return Package(name, version, self._plain(found["url"], name), int(found["size"]), found["sha256"])

    def locate_kernel(self, name: str, *, hops: int = 3) -> Package:
        """Like `locate`, following metapackages such as linux-image-cloud-amd64 to the package with the kernel."""
        try:
            depends = self._field(name, "Depends")
        except ToolFailed as error:
            raise self._unavailable(name, error.output) from error
        for alternative in re.split(r"[,|]", depends):
            target = alternative.split()[0] if alternative.split() else ""
            if target.startswith("linux-image-") and hops:
                return self.locate_kernel(target, hops=hops - 1)
        return self.locate(name)

    def _plain(self, url: str, name: str) -> str:
        """`url` as one that can be fetched without apt. Raises SourceRefused."""
        if url.startswith("mirror+file:"):
            url = _first_mirror(url.removeprefix("mirror+file:")) or url
        if not url.startswith(("http://", "https://", "file:/")):
            problem = f"apt fetches it from {url[:200]!r}; only http, https and file can be fetched here"
            raise SourceRefused(self._subject(name), problem, hint="give apt such a source for this package")
        return url

    def _apt(self, tool: str, *words: str) -> str:
        # not where the user is: `apt-get download` names nothing that it finds there
        return run([tool, *self._options, *words], missing=_NO_APT, cwd=self._state)

    def _field(self, package: str, field: str) -> str:
        record = self._apt("apt-cache", "show", "--no-all-versions", package)
        found = re.search(rf"^{field}: (.*)$", record, re.MULTILINE)
        return found[1] if found else ""

    def _subject(self, name: str) -> str:
        return f"package {name} ({self.arch.debian})"

    def _unavailable(self, name: str, output: str) -> SourceUnavailable:
        reasons = [("apt", line) for line in self.failed_sources] or [("apt", output.strip() or "no such package")]
        return SourceUnavailable(self._subject(name), tried=reasons, hint=_WHAT_ELSE)


def _first_mirror(path: str) -> str | None:
    """The URL behind `<list of mirrors>/<file>` (apt-transport-mirror(1)): below the first mirror of the list."""
    for directory in Path(path).parents:
        if directory.is_file():
            lines = (line.split("#")[0].split() for line in directory.read_text(errors="replace").splitlines())
            first = next((words[0] for words in lines if words), None)
            return f"{first.rstrip('/')}/{Path(path).relative_to(directory)}" if first else None
    return None


def apt_proxies() -> dict[str, str]:
    """The proxies apt is configured to use, by URL scheme (apt.conf(5), Acquire::http::Proxy); none without apt."""
    question = ["apt-config", "shell", "http", "Acquire::http::Proxy", "https", "Acquire::https::Proxy"]
    try:
        settings = run(question, missing=_NO_APT)
    except ToolMissing:
        return {}
    pairs = (word.split("=", 1) for word in shlex.split(settings))
    return {scheme: url for scheme, url in pairs if url and url.upper() != "DIRECT"}
