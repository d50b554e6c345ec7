"""What integration tests share: the command line, a loopback mirror of the archive, other users, no network."""

from __future__ import annotations

import functools
import json
import os
import posixpath
import pwd
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from systemfiles.foundation.digest import Digest
from systemfiles.foundation.files import NewFile
from systemfiles.foundation.lockfile import PackagePin, read_lock
from systemfiles.sources.apt import apt_proxies
from systemfiles.sources.http import fetch
from tests.conftest import CHECKOUT

Completed = subprocess.CompletedProcess[str]
# a port that nothing listens on: discard(9) has no server for decades, and no test binds it
CLOSED = "http://127.0.0.1:9/"


def systemfiles(*words: str | Path, cwd: Path = CHECKOUT, python: str = sys.executable) -> Completed:
    """Runs the command line tool."""
    return completed([python, "-m", "systemfiles.cli", *map(str, words)], cwd=cwd)


def completed(command: list[str], *, cwd: Path = CHECKOUT, env: Mapping[str, str] | None = None) -> Completed:
    """Runs any program to its end."""
    return subprocess.run(
        command, cwd=cwd, env=env, check=False, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )


def done_tasks(printed: str) -> set[str]:
    """The tasks that doit says it did something for."""
    return {line[3:].split()[0] for line in printed.splitlines() if line.startswith(".  ")}


def tree(directory: Path) -> set[str]:
    """Every regular file and link below `directory`, as relative paths."""
    found = (path for path in directory.rglob("*") if not path.is_dir() or path.is_symlink())
    return {str(path.relative_to(directory)) for path in found}


def copy_data_dir(source: Path, target: Path) -> None:
    """A copy that keeps hard links, modes and times, and that looks as if its files had been hashed there already."""
    subprocess.run(["cp", "-a", "--reflink=auto", str(source), str(target)], check=True)
    for stamps in target.glob("system/*/*/*/stamp.json"):
        found = {}
        for name, (*_, sha256) in json.loads(stamps.read_text()).items():
            stat = (stamps.parent / name).lstat()
            found[name] = [stat.st_dev, stat.st_ino, stat.st_mtime_ns, sha256]
        stamps.write_text(json.dumps(found))


@functools.cache
def without_network() -> tuple[str, ...]:
    """What to put before a command so that it reaches no network, not even this host's own."""
    for words in (("unshare", "--net"), ("unshare", "--map-root-user", "--net")):
        if shutil.which(words[0]) and completed([*words, "true"]).returncode == 0:
            return words
    # a container without namespaces: the proxies that requests and apt are told to use are not there
    return ("env", *(f"{name}={CLOSED}" for name in ("http_proxy", "https_proxy")), "no_proxy=")


class Mirror:
    """The package files of a versions.lock on a loopback server that remembers who asked for what."""

    def __init__(self, lock: Path, scratch: Path) -> None:
        self._files: dict[str, tuple[str, Path]] = {}
        self._origins: set[str] = set()
        self._requests: list[str] = []
        self.pause = 0.0
        """seconds between pieces of 64 KiB"""
        for label, pin in _pins(lock):
            parts = urlsplit(pin.url)
            self._origins.add(f"{parts.scheme}://{parts.netloc}/")
            self._files[unquote(parts.path)] = (label, _fetch(pin, scratch))
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/"

    @property
    def variable(self) -> str:
        """What $SYSTEMFILES_MIRRORS has to be so that every package is looked for here first."""
        return " ".join(f"{origin}={self.url}" for origin in sorted(self._origins))

    @property
    def requests(self) -> list[str]:
        """What was asked for since `forget`, sorted, such as "kernel x86_64"; unknown paths as they are."""
        return sorted(self._requests)

    def forget(self) -> None:
        self._requests.clear()
        self.pause = 0.0

    def package(self, label: str) -> Path:
        """The file behind a label."""
        (path,) = {path for known, path in self._files.values() if known == label}
        return path

    def serve(self, path: str, file: Path) -> None:
        """Gives out `file` under `path` from now on."""
        self._files[path] = (self._label(file), file)

    def _label(self, file: Path) -> str:
        return next((label for label, known in self._files.values() if known == file), file.name)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                # clients write "/./" or leave it out
                label, path = mirror._files.get(posixpath.normpath(unquote(self.path)), (self.path, None))
                mirror._requests.append(label)
                if path is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(path.stat().st_size))
                self.end_headers()
                with path.open("rb") as stream, suppress(ConnectionError):
                    while piece := stream.read(1 << 16):
                        self.wfile.write(piece)
                        time.sleep(mirror.pause)

            def log_message(self, format: str, *args: object) -> None:
                """Nothing: the requests are on record."""

        return Handler


def _pins(lock: Path) -> Iterator[tuple[str, PackagePin]]:
    versions = read_lock(lock)
    for kind, entries in (("kernel", versions.kernel), ("busybox", versions.busybox)):
        for pins in entries.values():
            for arch, pin in pins.items():
                yield f"{kind} {arch}", pin


def _fetch(pin: PackagePin, scratch: Path) -> Path:
    target = scratch / pin.sha256
    with NewFile(scratch) as out:
        fetch(pin.url, out, subject=pin.package, digest=Digest.from_hex(pin.sha256), proxies=apt_proxies())
        out.commit(target)
    return target


def apt_archive(mirror: Mirror, directory: Path, *, kernel: str, busybox: str) -> Path:
    """An apt archive behind `mirror` whose newest packages have these versions; returns an apt.conf(5) that uses it.

    The packages are those that the mirror has. The layout is that of a flat repository, sources.list(5).
    """
    stanzas = [f"Package: linux-image-cloud-amd64\nArchitecture: amd64\nVersion: {kernel}\nDepends: linux-image-test\n"]
    for label, name, version in (("kernel", "linux-image-test", kernel), ("busybox", "busybox-static", busybox)):
        package = mirror.package(f"{label} x86_64")
        mirror.serve(f"/apt/{name}.deb", package)
        stanzas.append(
            f"Package: {name}\nArchitecture: amd64\nVersion: {version}\nFilename: ./{name}.deb\n"
            f"Size: {package.stat().st_size}\nSHA256: {package.name}\n"
        )
    packages = "\n".join(stanzas).encode()
    (directory / "Packages").write_bytes(packages)
    digest = Digest.of(packages).hex
    (directory / "Release").write_text(
        f"Date: {formatdate(usegmt=True)}\nSHA256:\n {digest} {len(packages)} Packages\n"
    )
    for name in ("Packages", "Release"):
        mirror.serve(f"/apt/{name}", directory / name)
    return apt_conf(directory, f"deb [trusted=yes] {mirror.url}apt ./\n")


def apt_conf(directory: Path, sources: str) -> Path:
    """An apt.conf(5) under which `sources` are all that apt knows."""
    (directory / "sources.list").write_text(sources)
    conf = directory / "apt.conf"
    conf.write_text(
        f'Dir::Etc::sourcelist "{directory}/sources.list";\nDir::Etc::sourceparts "/dev/null";\nAcquire::Retries "0";\n'
    )
    return conf


def stage(target: Path) -> Path:
    """A copy of the package and of what is beside it in a checkout, importable from `target`."""
    shutil.copytree(CHECKOUT / "systemfiles", target / "systemfiles", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("versions.toml", "dodo.py"):
        shutil.copy(CHECKOUT / name, target / name)
    return target


# Everything is imported before the privileges are dropped: the other user may not be able to read a checkout or a
# virtual environment below some home directory.
_PRELUDE = """
import importlib, os, pkgutil, sys
import elftools.elf.elffile, libarchive, platformdirs, requests, tqdm
import systemfiles
for module in pkgutil.walk_packages(systemfiles.__path__, "systemfiles."):
    importlib.import_module(module.name)
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(int(sys.argv[2]))
    os.setuid(int(sys.argv[1]))
del sys.argv[1:3]
"""


def nobody() -> pwd.struct_passwd:
    """An unprivileged user: "nobody" when the tests run as root, else whoever runs them."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())


def as_nobody(script: str, *arguments: str | Path, package: Path, env: Mapping[str, str] | None = None) -> Completed:
    """Runs Python code with the package staged at `package` as an unprivileged user."""
    user = nobody()
    words = [sys.executable, "-c", _PRELUDE + script, str(user.pw_uid), str(user.pw_gid), *map(str, arguments)]
    return completed(words, cwd=Path("/"), env={**os.environ, "PYTHONPATH": str(package), **(env or {})})


@contextmanager
def writable_again(directory: Path) -> Iterator[None]:
    """Takes write permission from everything below `directory` for as long as the block runs."""
    subprocess.run(["chmod", "-R", "a-w", str(directory)], check=True)
    try:
        yield
    finally:
        subprocess.run(["chmod", "-R", "u+w", str(directory)], check=True)
