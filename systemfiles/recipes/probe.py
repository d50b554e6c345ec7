"""What runs in guests to tell how they are: an image made of the initrd's own busybox and a script, guest/probe.sh.

The image, which has nothing that a guest could not do without::

    bin/busybox, bin/sh -> busybox      the initrd's own, so that no image has to be fetched
    bin/probe                           the script
    sbin/init                           the same as PID 1
    etc/passwd, etc/group               with the user `probe`, who is in two more groups

With any other image, busybox and the script are on a volume instead, beside a file `environment`::

    set -- 'NAME=VALUE' ... "$@"        what the image's configuration says, for a shell
"""

from __future__ import annotations

import io
import os
import re
import stat
import tarfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from systemfiles.foundation import cpioreader
from systemfiles.foundation.archive import BadStream
from systemfiles.foundation.cpio import Record
from systemfiles.foundation.errors import InvalidArchive, blaming
from systemfiles.foundation.unpack import Compression, Limits, Packed, unpacked
from systemfiles.recipes import busybox, qemu
from systemfiles.recipes.guestconfig import GuestConfig, Network, Volume, listed, signal_number

NETWORK = Network("10.0.2.15/24", gateway=qemu.HOST, dns=("10.0.2.3",))
HOSTNAME = "systemfiles-probe"
PLACE = "/.systemfiles-probe"
"""Where the probe is in the guest of any image: a name that no image has a use for."""
STATUS = 42
"""What the probe ends with when it gets the signal that it asks for."""
AS_DELIVERED = "as delivered"
WORDS = (
    *("", " ", "it's", '"', "\\", "$HOME", "$(echo no)", "`echo no`", "a\nb\n", "\r\t", "*", "~", "-n", "--", "a=b"),
    *("é 日本 🎉", bytes(range(1, 256)).decode("utf-8", "surrogateescape")),
)
"""What a careless shell would change."""
ENVIRONMENT = {
    "PATH": "/nowhere:/bin",
    "HOME": "/some where",
    "EVERYTHING": "".join(WORDS),
    "EMPTY": "",
    "NOT.A-NAME": "a b",
    "-u": "x",
    "IFS": "e",
}
VOLUMES = (
    Volume("reference", "/volumes/reference", "ro"),
    Volume("data", "/volumes/data", "rw"),
    Volume("template", "/volumes/template", "overlay", "changes"),
)
USER, UID, GID, GROUPS = "probe", 1000, 1001, frozenset({1001, 50, 2000})
ROOTS_GROUPS = frozenset({0, 50})

_SCRIPT = Path(__file__).parent / "guest" / "probe.sh"
_PASSWD = f"root:x:0:0:root:/root:/bin/sh\n{USER}:x:{UID}:{GID}::/home/{USER}:/bin/sh\n"
_GROUP = f"root:x:0:\nstaff:x:50:root,{USER}\n{USER}:x:{GID}:\nlogs:x:2000:nobody,{USER}\n"
_INITRD_MAX = 256 << 20

Entry = bytes | str | tuple[bytes, int] | None
"""In a tree by path: a program, where a link leads, content and mode of another file, or a directory."""


@dataclass(frozen=True, slots=True)
class Probe:
    """The initrd's busybox, the modules that its init has to load, and a word that no other run knows."""

    busybox: bytes
    modules: frozenset[str]
    nonce: str

    @classmethod
    def of(cls, initrd: Path) -> Probe:
        """From the initrd that is to be checked. Raises InvalidArchive."""
        records = {record.name: record for record in _records(initrd)}
        modules = {
            record.name.rpartition("/")[2].partition(".")[0].replace("-", "_")
            for record in records.values()
            if record.name.startswith("lib/modules/") and ".ko" in record.name
        }
        wanted = _content(records, "etc/modules").decode(errors="replace").replace("-", "_").split()
        binary = _content(records, busybox.PATH)
        if not binary:
            raise InvalidArchive(initrd, f"it holds no {busybox.PATH}, which the probe needs")
        return cls(binary, frozenset(modules.intersection(wanted)), os.urandom(8).hex())

    def image(self) -> io.BytesIO:
        """The one layer of the image."""
        return layer(
            {
                "bin/busybox": self.busybox,
                "bin/sh": "busybox",
                "bin/probe": _SCRIPT.read_bytes(),
                "sbin/init": f"#!/bin/sh\nexec /bin/probe {self.nonce} systemd\n".encode(),
                "etc/passwd": (_PASSWD.encode(), 0o644),
                "etc/group": (_GROUP.encode(), 0o644),
            }
        )

    def full(self) -> GuestConfig:
        """To use everything that a guest may be told to use."""
        return GuestConfig(
            entrypoint=["probe", self.nonce, "full"],
            cmd=[qemu.SERVER, *WORDS],
            environment=ENVIRONMENT,
            workdir="/made/for/it",
            hostname=HOSTNAME,
            network=NETWORK,
            volumes=VOLUMES,
        )

    def user(self) -> GuestConfig:
        """To run as somebody else."""
        return GuestConfig(entrypoint=["probe", self.nonce, "user"], environment={"PATH": "/bin"}, user=USER)

    def systemd(self) -> GuestConfig:
        """To be PID 1."""
        return GuestConfig(init_mode="systemd", environment={"PATH": "/bin", "NONCE": self.nonce})

    def before(self, config: GuestConfig, seconds: float) -> GuestConfig:
        """`config` with the probe before its entrypoint, which is asked to end after so many seconds."""
        stop = signal_number(config.stop_signal or "TERM")
        probe = [f"{PLACE}/busybox", "sh", f"{PLACE}/probe", self.nonce, "image"]
        probe += [f"{seconds:g}", str(stop), qemu.SERVER, config.workdir or "/"]
        return replace(
            config,
            entrypoint=[*probe, *config.entrypoint],
            hostname=HOSTNAME,
            network=NETWORK,
            volumes=[Volume("probe", PLACE, "ro")],
        )

    def volume(self, config: GuestConfig) -> io.BytesIO:
        """What the probe needs to be in the guest of another image."""
        words = listed(f"{name}={value}" for name, value in config.environment.items())
        environment = f'set -- {words} "$@"\n'.encode("utf-8", "surrogateescape")
        return layer({"busybox": self.busybox, "probe": _SCRIPT.read_bytes(), "environment": environment})

    def told(self, name: str) -> re.Pattern[str]:
        """By which the console shows that the probe told this."""
        return re.compile(f"^{_told_by(self.nonce)}{re.escape(name)} ", re.MULTILINE)

    def facts(self, console: str) -> dict[str, str]:
        """What the probe told: the first of each name."""
        told: dict[str, str] = {}
        for name, value in re.findall(f"^{_told_by(self.nonce)}([a-zA-Z0-9.-]+) (.*)$", console, re.MULTILINE):
            told.setdefault(name, value)
        return told


def _told_by(nonce: str) -> str:
    return f"systemfiles-probe {nonce}: "


def layer(tree: Mapping[str, Entry]) -> io.BytesIO:
    """An image's layer with `tree` in it: root owns it all."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, entry in tree.items():
            member = tarfile.TarInfo(name)
            content, member.mode = entry if isinstance(entry, tuple) else (b"", 0o755)
            if entry is None:
                member.type = tarfile.DIRTYPE
            elif isinstance(entry, str):
                member.type, member.linkname = tarfile.SYMTYPE, entry
            elif isinstance(entry, bytes):
                content = entry
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    out.seek(0)
    return out


@contextmanager
def serving(content: str) -> Iterator[int]:
    """The port of a server on the loopback interface that answers every request with `content`."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 300

        def do_GET(self) -> None:
            self.send_response(200)
            # without a length, the guest would wait for an end that QEMU does not pass on
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield server.server_port
        finally:
            server.shutdown()


def _records(initrd: Path) -> tuple[Record, ...]:
    with initrd.open("rb") as file, blaming(initrd):
        packed = Packed(file)
        try:
            data = b"".join(unpacked(packed, packed.told([Compression.GZIP]), Limits(_INITRD_MAX), members=True))
        except BadStream as error:
            raise InvalidArchive(initrd, f"it is damaged ({error})") from error
        return cpioreader.read(io.BytesIO(data))


def _content(records: Mapping[str, Record], name: str) -> bytes:
    """That of a file, under whichever of its names; nothing where there is none."""
    record = records.get(name)
    if record is not None and record.hardlink:
        record = records.get(record.hardlink)
    if record is None or record.type != stat.S_IFREG or not isinstance(record.data, bytes):
        return b""
    return record.data
