"""A guest that uses all there is to use, on each kind of machine: what it finds, and what is left when it has ended."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from systemfiles.recipes.disks import write_config_disk, write_overlay_disk
from systemfiles.recipes.guestconfig import GuestConfig, Network, Volume
from systemfiles.recipes.probe import WORDS as HOSTILE

from . import qemu
from .guest import OVERLAY_SIZE, Host, Provisioned, shell
from .qemu import MACHINES, BootFiles, Machine, Outcome

pytestmark = pytest.mark.boot

ENVIRONMENT = {
    "PATH": "/nowhere:/bin",
    "HOSTILE": "".join(HOSTILE),
    "EMPTY": "",
    "A.NAME": "a b",
    "-u": "x",
    "init_run": "/x",
    "PWD": "x",
    "IFS": "e",
}
VOLUMES = (
    Volume("reference", "/ref", "ro"),
    Volume("data", "/var/run/data", "rw"),
    Volume("template", "/instance", "overlay", "changes"),
)
# Each fact is a line of the console: its name, a colon, and what there is to say.
SCRIPT = """
fact() { name=$1; shift; echo "$name:$("$@" 2>&1 | tr '\\n' ';')"; }
hex() { od -An -v -tx1 "$1" | tr -d ' \\n'; }
fact cmdline hex /proc/$$/cmdline
fact environ hex /proc/$$/environ
fact directory readlink /proc/$$/cwd
fact ids grep -E '^(Uid|Gid|Groups)' /proc/$$/status
fact session cut -d' ' -f6 /proc/$$/stat
fact pid echo $$
fact dev sh -c 'for link in fd stdin stdout stderr; do readlink /dev/$link; done'
fact mounts cut -d' ' -f2,3 /proc/mounts
fact shm stat -c %a /dev/shm
fact namespaces unshare -U true
echo 'stdout:can be opened' >/dev/stdout
fact hostname hostname
fact names cat /etc/hostname /etc/hosts /etc/resolv.conf
fact address ip -o -4 addr
fact routes ip route
fact fetched wget -q -O - "http://$2/"
fact refused touch /ref/new
fact reference cat /ref/value
for file in /var/run/data/value /instance/value; do
    fact "was $file" cat $file
    echo "$1" >$file
done
"""


class Server(BaseHTTPRequestHandler):
    """Answers that it is the host."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"the host\n")

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Where a guest finds a server of this host's loopback interface."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"{qemu.HOST}:{http.server_port}"
        http.shutdown()


@dataclass(frozen=True)
class Seen:
    """Two boots of one guest: what it was told to run, its disks, and what it said."""

    words: tuple[str, ...]
    disks: dict[str, Path]
    first: Outcome
    second: Outcome

    def fact(self, name: str) -> str:
        """As the second boot tells it."""
        return fact(self.second, name)


def fact(outcome: Outcome, name: str) -> str:
    told = [line.partition(":")[2] for line in outcome.lines if line.startswith(f"{name}:")]
    assert len(told) == 1, outcome.console
    return told[0]


@pytest.fixture(scope="module", params=MACHINES, ids=str)
def seen(
    request: pytest.FixtureRequest,
    provisioned: Provisioned,
    built_in: Callable[[], BootFiles],
    tmp_path_factory: pytest.TempPathFactory,
    server: str,
) -> Seen:
    def config(word: str) -> GuestConfig:
        return shell(
            *(SCRIPT, word, server, *HOSTILE),
            environment=ENVIRONMENT,
            user="web",
            workdir="/home/link/work",
            hostname="guest-1.example",
            network=Network("10.0.2.15/24", gateway=qemu.HOST, dns=("10.0.2.3", "fd00::3")),
            volumes=VOLUMES,
        )

    machine: Machine = request.param
    host = Host(provisioned, tmp_path_factory.mktemp("contract"), built_in=built_in)
    tree = host.tree(machine) | {
        "home/real": None,
        "home/link": "/home/real",
        "run": None,
        "var/run": "/run",
        "etc/resolv.conf": "../run/nowhere/resolv.conf",
    }
    value = {"value": (b"as delivered\n", 0o666)}
    disks = {name: host.volume(name, value) for name in ("reference", "data", "template")}
    disks["changes"] = host.directory / "changes"
    write_overlay_disk(disks["changes"], OVERLAY_SIZE)
    disks |= host.disks(machine, config("first"), tree)
    first = host.boot(machine, disks, network=True, locked=["reference", "rootfs", "config"])
    told = config("second")
    write_config_disk(disks["config"], told)
    second = host.boot(machine, disks, network=True, locked=["reference", "rootfs", "config"])
    return Seen((*told.entrypoint, *told.cmd), disks, first, second)


def test_it_ends_as_its_entrypoint_did(seen: Seen) -> None:
    for outcome in (seen.first, seen.second):
        assert outcome.exit == 0, outcome.console
        assert outcome.errors == ()
        assert outcome.clean, outcome.console
        assert outcome.lines[-2:-1] == ["systemfiles: exit 0"]  # and then the kernel's last words


def test_every_word_of_the_command_line_arrives_byte_for_byte(seen: Seen) -> None:
    assert bytes.fromhex(seen.fact("cmdline")) == b"".join(os.fsencode(word) + b"\0" for word in seen.words)


def test_the_environment_is_what_was_said_and_a_home_byte_for_byte(seen: Seen) -> None:
    arrived = bytes.fromhex(seen.fact("environ")).removesuffix(b"\0").split(b"\0")
    said = [os.fsencode(f"{name}={value}") for name, value in ENVIRONMENT.items()]
    assert sorted(arrived) == sorted([*said, b"HOME=/home/web"])


def test_it_starts_in_its_directory_which_was_made_where_a_link_leads(seen: Seen) -> None:
    assert seen.fact("directory") == "/home/real/work;"


def test_it_runs_as_a_user_with_all_groups_of_that(seen: Seen) -> None:
    user = "\t".join(["1000"] * 4)
    group = "\t".join(["1001"] * 4)
    assert seen.fact("ids").split(";")[:2] == [f"Uid:\t{user}", f"Gid:\t{group}"]
    assert sorted(seen.fact("ids").split(";")[2].split()[1:]) == ["1001", "2000", "50"]


def test_it_leads_a_session_and_finds_the_kernels_file_systems(seen: Seen) -> None:
    assert seen.fact("session") == seen.fact("pid")
    assert seen.fact("dev") == "/proc/self/fd;/proc/self/fd/0;/proc/self/fd/1;/proc/self/fd/2;"
    assert seen.fact("stdout") == "can be opened"
    mounts = set(seen.fact("mounts").split(";"))
    expected = "/ overlay,/proc proc,/sys sysfs,/dev devtmpfs,/dev/pts devpts,/dev/shm tmpfs,/sys/fs/cgroup cgroup2"
    assert mounts >= set(expected.split(","))
    assert seen.fact("shm") == "1777;"


def test_it_may_make_a_user_namespace_which_none_in_a_mere_chroot_may(seen: Seen) -> None:
    assert seen.fact("namespaces") == ""


def test_its_network_reaches_the_host(seen: Seen) -> None:
    assert "eth0    inet 10.0.2.15/24" in seen.fact("address")
    assert "lo    inet 127.0.0.1/8" in seen.fact("address")
    assert "default via 10.0.2.2 dev eth0" in seen.fact("routes")
    assert seen.fact("fetched") == "the host;"


def test_it_knows_its_name_and_who_knows_others(seen: Seen) -> None:
    assert seen.fact("hostname") == "guest-1.example;"
    assert seen.fact("names").split(";")[:-1] == [
        "guest-1.example",
        "127.0.0.1 localhost guest-1.example",
        "::1 localhost",
        "nameserver 10.0.2.3",  # though the image's resolv.conf was a link that led nowhere
        "nameserver fd00::3",
    ]


def test_a_volume_to_be_read_cannot_be_written(seen: Seen) -> None:
    assert seen.fact("reference") == "as delivered;"
    assert "Read-only file system" in seen.fact("refused")


@pytest.mark.parametrize("path", ["/var/run/data/value", "/instance/value"])
def test_what_was_written_to_a_volume_is_found_again(seen: Seen, path: str) -> None:
    assert fact(seen.first, f"was {path}") == "as delivered;"
    assert seen.fact(f"was {path}") == "first;"
    assert "/run/data ext4" in seen.fact("mounts").split(";")  # so the link /var/run was followed in the image


def test_the_disks_that_are_only_read_stay_as_they_were(seen: Seen) -> None:
    assert b"as delivered\n" in seen.disks["template"].read_bytes()
    assert b"second\n" not in seen.disks["template"].read_bytes()
    assert b"second\n" in seen.disks["changes"].read_bytes()
    assert b"second\n" in seen.disks["data"].read_bytes()


@pytest.mark.parametrize("name", ["overlay", "changes"])
def test_no_disk_is_left_with_a_journal_to_replay(seen: Seen, name: str) -> None:
    with seen.disks[name].open("rb") as disk:
        disk.seek(1024 + 0x5C)  # the superblock's s_feature_compat and s_feature_incompat
        compatible, incompatible = struct.unpack("<II", disk.read(8))
    assert compatible & 4  # HAS_JOURNAL
    assert not incompatible & 4  # RECOVER
