"""What goes wrong is told in one line, and the machine ends: within 10 s by its own clock, and never by a panic.

Init waits for nothing but disks and a network device, so it is there that its own time is taken."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from systemfiles.recipes.guestconfig import GuestConfig, Network

from .guest import PASSWD, Entry, Host, shell
from .qemu import MACHINES, MICROVM_WITHOUT_ACPI, Q35, TALKATIVE, VIRT, Machine, Outcome

pytestmark = pytest.mark.boot

TRUE = shell("true")
MOST_SECONDS = 10
QUICK = MICROVM_WITHOUT_ACPI
"""Where the shapes of a failure are told that do not depend on the machine."""


def fails(outcome: Outcome, error: str, status: int = 125) -> None:
    """`error` is a pattern for the whole of what init tells right before the end."""
    assert len(outcome.errors) == 1, outcome.console
    assert re.fullmatch(error, outcome.errors[0]), outcome.errors
    assert outcome.exit == status
    assert outcome.clean, outcome.console


def counted(machine: Machine) -> Machine:
    """With a clock that counts instructions: on a busy host, one that is emulated may run by fits and starts."""
    return replace(machine, options=(*machine.options, "-icount", "shift=1"))


@pytest.mark.parametrize("missing", ["rootfs", "overlay", "config"])
def test_a_missing_disk_is_named(host: Host, missing: str) -> None:
    """On all machines at once, as each of them does little but wait."""

    def booted(machine: Machine) -> Outcome:
        place = replace(host, directory=host.directory / machine.name)
        place.directory.mkdir()
        disks = place.disks(machine, TRUE)
        del disks[missing]
        return place.boot(counted(machine), disks, arguments=TALKATIVE)

    with ThreadPoolExecutor() as threads:
        for outcome in threads.map(booted, MACHINES):
            fails(outcome, rf"missing disk: {missing} \(waited 5 s, and there is: vda vdb\)")
            assert 4 < outcome.init_seconds < MOST_SECONDS, outcome.console


@dataclass(frozen=True)
class Failure:
    """What a guest is told to do, what is wrong with its machine or its image, and what it says of that."""

    error: str
    status: int = 125
    config: GuestConfig | str = TRUE
    locked: Sequence[str] = ()
    filled: bool = False
    """Whether a guest has left no space on the overlay disk."""


FAILURES = {
    "empty-config": Failure(r"nothing to run \(config.sh sets neither ENTRYPOINT nor CMD\)", config=""),
    "broken-config": Failure(
        r"config.sh is broken \(/run/config/config.sh: line 2: syntax error: .*\)", config="CMD='\n"
    ),
    "missing-entrypoint": Failure(
        r"entrypoint nginx not found \(PATH is /bin\)", 127, GuestConfig(["nginx"], environment={"PATH": "/bin"})
    ),
    "not-executable": Failure(
        r"cannot run entrypoint /etc/passwd \(it is not executable\)", 126, GuestConfig(["/etc/passwd"])
    ),
    "wrong-architecture": Failure(
        r"cannot run entrypoint /foreign \(it was built for another architecture\)", 126, GuestConfig(["/foreign"])
    ),
    "bad-address": Failure(
        r"cannot give eth0 the address 10.0.2.315/24 \(.*\)", config="CMD=true GUEST_IP=10.0.2.315 GUEST_CIDR=24\n"
    ),
    "read-only-overlay": Failure(r"cannot write the overlay disk vdb \(it is read-only\)", locked=["overlay"]),
    "full-overlay": Failure(r"cannot write the overlay disk vdb \(no space is left on it\)", filled=True),
}


@pytest.mark.parametrize("machine", MACHINES, ids=str)
@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_a_failure_is_told_in_one_line_and_soon_ends_any_machine(
    host: Host, machine: Machine, failure: Failure
) -> None:
    other = VIRT if machine.arch == Q35.arch else Q35
    foreign = {"foreign": host.provisioned.busybox(other.arch)}
    disks = host.disks(machine, failure.config, host.tree(machine) | foreign)
    if failure.filled:
        disks["overlay"] = filled_overlay(replace(host, directory=host.directory / "filling"))
    clocked = machine if machine is QUICK else counted(machine)  # which takes that one too long
    outcome = host.boot(clocked, disks, locked=failure.locked, network=True, arguments=TALKATIVE)
    fails(outcome, failure.error, failure.status)
    assert machine is QUICK or outcome.init_seconds < MOST_SECONDS, outcome.console


def filled_overlay(host: Host) -> Path:
    host.directory.mkdir()
    disks = host.disks(QUICK, shell("dd if=/dev/zero of=/filling bs=4096; echo x >>/filling; echo full"))
    outcome = host.boot(QUICK, disks)
    assert "full" in outcome.lines, outcome.console
    assert outcome.clean
    return disks["overlay"]


@pytest.mark.parametrize("role", ["rootfs", "overlay", "config"])
def test_a_disk_that_holds_no_file_system_is_named(host: Host, role: str) -> None:
    disks = host.disks(QUICK, TRUE)
    disks[role].unlink()
    disks[role].write_bytes(bytes(1 << 20))
    kind = "ext4" if role == "overlay" else "ext4, squashfs or erofs"
    fails(host.boot(QUICK, disks), rf"cannot mount the {role} disk vd[abc] as {kind} \(Invalid argument\)")


def test_a_config_disk_without_a_config_is_told(host: Host) -> None:
    disks = host.disks(VIRT, TRUE)
    host.write_root(disks["config"], {})
    fails(host.boot(VIRT, disks), r"no config.sh \(the config disk does not hold it\)")


@pytest.mark.parametrize(
    ("config", "error"),
    [
        pytest.param("exit 0\n", r"config.sh is broken \(it ends the shell that reads it\)", id="exits"),
        pytest.param("CMD=\\'", r"config.sh is broken \(.*\)", id="list"),
        pytest.param("CMD=true ENVIRONMENT=X\n", r"bad ENVIRONMENT \(X is not NAME=VALUE\)", id="environment"),
        pytest.param("CMD=true INIT_MODE=runit\n", r"bad INIT_MODE runit \(.*\)", id="init-mode"),
        pytest.param("CMD=true STOP_SIGNAL=65\n", r"bad STOP_SIGNAL 65 \(.*\)", id="stop-signal"),
        pytest.param("CMD=true RUN_AS=nobody\n", r"cannot run as nobody \(.*\)", id="user"),
        pytest.param("CMD=true RUN_AS=99999999999\n", r"cannot run as 99999999999 \(.* of no user\)", id="user-number"),
        pytest.param(
            "CMD=true RUN_AS=0:99999999999\n", r"cannot run with the group .* of no group\)", id="group-number"
        ),
        pytest.param("CMD=true RUN_AS=$'\\033x'\n", r"cannot run as  x \(.*\)", id="control-characters"),
        pytest.param("CMD=true RUN_AS=web:wheel\n", r"cannot run with the group wheel \(.*\)", id="group"),
        pytest.param(
            "CMD=true WORKDIR=/bin/sh/x\n", r"cannot make the working directory /bin/sh/x \(.*\)", id="workdir"
        ),
        pytest.param("CMD=true VOLUME_MOUNTS=vda:/x\n", r"bad volume vda:/x \(.*\)", id="volume"),
        pytest.param("CMD=true VOLUME_MOUNTS=vdx:/x:ro\n", r"missing disk: vdx \(waited 5 s\)", id="no-volume"),
        pytest.param("CMD=true GUEST_HOSTNAME=a_b\n", r"cannot be called a_b \(.*\)", id="hostname"),
        pytest.param("CMD=true GUEST_DNS=one.one\n", r"bad GUEST_DNS one.one \(it is no address\)", id="dns"),
    ],
)
def test_a_config_that_cannot_be_met_is_told(host: Host, config: str, error: str) -> None:
    fails(host.run(QUICK, config), error)


@pytest.mark.parametrize(
    ("config", "error"),
    [
        pytest.param("GUEST_IP=10.0.2.15\n", r"cannot give eth0 the address 10.0.2.15 \(neither .*\)", id="no-prefix"),
        pytest.param(
            "GUEST_IP=10.0.2.15 GUEST_CIDR=33\n", r"cannot give eth0 the address 10.0.2.15/33 \(.*\)", id="cidr"
        ),
        pytest.param(
            "GUEST_IP=10.0.2.15 GUEST_MASK=255.255.255.0 GUEST_GW=192.0.2.1\n",
            r"cannot route by 192.0.2.1 \(Network is unreachable\)",
            id="gateway-elsewhere",
        ),
    ],
)
def test_a_network_that_cannot_be_is_told(host: Host, config: str, error: str) -> None:
    fails(host.run(QUICK, "CMD=true\n" + config, network=True), error)


def test_a_network_without_a_device_is_told(host: Host) -> None:
    config = replace(TRUE, network=Network("10.0.2.15/24"))
    outcome = host.run(counted(Q35), config, arguments=TALKATIVE)
    fails(outcome, r"missing network device: eth0 \(waited 5 s\)")
    assert 4 < outcome.init_seconds < MOST_SECONDS, outcome.console


@pytest.mark.parametrize(
    ("words", "status", "error"),
    [
        pytest.param(["/bin/nginx\nx"], 127, r"entrypoint /bin/nginx x not found \(.*\)", id="newline"),
        pytest.param(["/etc"], 126, r"cannot run entrypoint /etc \(it is not a file\)", id="directory"),
        pytest.param(["/text"], 126, r"cannot run entrypoint /text \(it is neither an ELF program .*\)", id="text"),
        pytest.param(["/script"], 126, r"cannot run entrypoint /script \(its interpreter /bin/bash .*\)", id="script"),
        pytest.param(
            ["/script-of-text"],
            126,
            r"cannot run .* \(its interpreter /etc/group is not executable\)",
            id="not-program",
        ),
        pytest.param(
            ["/foreign-script"], 126, r"cannot .* \(its interpreter /foreign .* architecture\)", id="foreign-script"
        ),
    ],
)
def test_an_entrypoint_that_cannot_run_is_told(host: Host, words: list[str], status: int, error: str) -> None:
    tree: dict[str, Entry] = {
        "foreign": host.provisioned.busybox(VIRT.arch),
        "text": b"hello\n",
        "script": b"#!/bin/bash -e\n",
        "script-of-text": b"#!/etc/group\n",
        "foreign-script": b"#! /foreign\n",
    }
    outcome = host.run(QUICK, GuestConfig(entrypoint=words, environment={"PATH": "/bin"}), host.tree(QUICK) | tree)
    fails(outcome, error, status)


def elf(machine: int, *, loader: str = "", headers: int = 1) -> bytes:
    """A 64-bit program that asks for `loader` and, where that is there, is killed for all else it lacks."""
    path = loader.encode() + b"\0"
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, machine, 1, 0, 64, 0, 0, 64, 56, headers, 0, 0, 0)
    return header + struct.pack("<IIQQQQQQ", 3, 4, 120, 120, 120, len(path), len(path), 1) + path


REFUSED: dict[str, tuple[Entry, str]] = {
    "loader": (elf(62, loader="/lib64/ld-linux.so.9"), "/refused needs /lib64/ld-linux.so.9, which is missing"),
    "loader-of-interpreter": (b"#!/dynamic -x\n", "/dynamic needs /lib64/ld-linux.so.9, which is missing"),
    "damaged": (elf(62, headers=0), "the kernel does not know its format"),
}


@pytest.mark.parametrize(
    ("case", "user", "shell_there"),
    [
        ("loader", "", False),
        ("loader", "web", True),
        ("loader-of-interpreter", "4321", True),
        ("damaged", "", False),
        ("damaged", "web", True),  # which libc lets that shell try
    ],
)
def test_an_entrypoint_that_only_the_kernel_refuses_is_told(
    host: Host, case: str, user: str, shell_there: bool
) -> None:
    entry, why = REFUSED[case]
    tree = {"refused": entry, "dynamic": REFUSED["loader"][0], "etc/passwd": (PASSWD, 0o644)}
    if shell_there:
        tree |= {"bin/sh": host.provisioned.busybox(Q35.arch)}
    outcome = host.run(Q35, GuestConfig(entrypoint=["/refused"], user=user), tree)
    fails(outcome, re.escape(f"cannot run entrypoint /refused ({why})"), 126)


@pytest.mark.parametrize("user", ["web", "4321"])
def test_an_entrypoint_that_its_user_may_not_execute_is_told(host: Host, user: str) -> None:
    tree = host.tree(Q35) | {"private": (b"#!/bin/sh\n", 0o700)}
    outcome = host.run(Q35, GuestConfig(entrypoint=["/private"], user=user), tree)
    fails(outcome, r"cannot run entrypoint /private \(Permission denied\)", 126)


@pytest.mark.parametrize(("status", "user"), [(1, "web"), (2, ""), (126, "4321"), (127, "web")])
def test_an_entrypoint_that_ran_may_end_with_any_status(host: Host, status: int, user: str) -> None:
    outcome = host.run(VIRT, shell(f"echo once; exit {status}", user=user))
    assert outcome.lines[-4:-1] == ["once", "", f"systemfiles: exit {status}"], outcome.console
    assert outcome.clean


def test_an_overlay_that_was_written_before_is_told_to_be_read_only(host: Host) -> None:
    disks = host.disks(QUICK, TRUE)
    assert host.boot(QUICK, disks).exit == 0
    fails(host.boot(QUICK, disks, locked=["overlay"]), r"cannot write the overlay disk vdb \(it is read-only\)")


def test_a_new_overlay_without_space_is_told(host: Host) -> None:
    disks = host.disks(QUICK, TRUE)
    host.write_root(disks["overlay"], {})  # such a disk has no space to spare
    disks["overlay"].chmod(0o600)
    fails(host.boot(QUICK, disks), r"cannot write the overlay disk vdb \(No space left on device\)")


def test_a_shell_is_there_to_look_around_only_when_the_command_line_asks(host: Host) -> None:
    # the first bytes come before the serial line is set up, and are lost
    typed = b"\n" * 32 + b"echo there are $(ls -d /proc/1/root/run/rootfs/*)\nexit\n"
    outcome = host.run(Q35, "", {"etc": None}, arguments="systemfiles.debug", typed=typed)
    assert "there are /proc/1/root/run/rootfs/etc" in outcome.console
    told = next(line for line in outcome.lines if line.startswith("systemfiles: error: "))
    assert re.fullmatch(r"systemfiles: error: nothing to run \(.*\)", told)
    assert (outcome.exit, outcome.clean) == (125, True)
    outcome = host.run(Q35, "", {"etc": None}, typed=typed)
    assert "there are /proc/1/root/run/rootfs/etc" not in outcome.console
    fails(outcome, r"nothing to run \(.*\)")
