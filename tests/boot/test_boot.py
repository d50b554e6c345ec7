"""What `doit profile=debian arch=x86_64,aarch64` made, booted as it is, in virtual machines of both architectures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from . import guest, qemu
from .qemu import MICROVM, MICROVM_WITHOUT_ACPI, Q35, VIRT, Machine, Outcome

pytestmark = pytest.mark.boot


class Provisioned(Protocol):
    """What the fixture `provisioned` gives."""

    def boot_files(self, arch: str) -> qemu.BootFiles: ...

    def busybox(self, arch: str) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Host:
    """A place where guests run: makes their disks, and boots them with what was provisioned."""

    provisioned: Provisioned
    directory: Path

    def disks(self, machine: Machine, config: str) -> dict[str, Path]:
        return {
            "rootfs": guest.write_rootfs(self.directory / "rootfs", self.provisioned.busybox(machine.arch)),
            "overlay": guest.write_overlay(self.directory / "overlay"),
            "config": guest.write_config(self.directory / "config", config),
        }

    def boot(self, machine: Machine, disks: dict[str, Path], *, serials: bool = True) -> Outcome:
        return qemu.boot(machine, self.provisioned.boot_files(machine.arch), disks, serials=serials)

    def run(self, machine: Machine, config: str) -> Outcome:
        return self.boot(machine, self.disks(machine, config))


@pytest.fixture
def host(provisioned: Provisioned, tmp_path: Path) -> Host:
    return Host(provisioned, tmp_path)


def shell(script: str) -> str:
    """A config.sh that runs `script` in the image's own shell."""
    return guest.command("sh", "-c", script)


@pytest.mark.parametrize("serials", [True, False], ids=["by-serial", "by-letter"])
@pytest.mark.parametrize("machine", [Q35, MICROVM, VIRT], ids=str)
def test_the_entrypoint_runs_and_its_end_switches_the_machine_off(host: Host, machine: Machine, serials: bool) -> None:
    disks = host.disks(
        machine, shell('echo "I am $(readlink /proc/self/exe), root is $(grep -o ^overlay /proc/mounts)"')
    )
    outcome = host.boot(machine, disks, serials=serials)
    assert "I am /bin/busybox, root is overlay" in outcome.lines, outcome.console
    assert outcome.exit == 0, outcome.console
    assert outcome.errors == ()
    assert outcome.clean, outcome.console


def test_the_guest_writes_to_the_overlay_alone_and_finds_it_again(host: Host) -> None:
    disks = host.disks(Q35, shell("cat /kept && exit; echo 'from the first boot' >/kept; echo nothing yet"))
    before = {name: disks[name].read_bytes() for name in ("rootfs", "config")}
    first, second = host.boot(Q35, disks), host.boot(Q35, disks)
    assert "nothing yet" in first.lines
    assert "from the first boot" in second.lines
    assert first.clean
    assert second.clean
    assert {name: disks[name].read_bytes() for name in before} == before


def test_every_word_arrives_as_it_was_written(host: Host) -> None:
    words = [
        "",
        " ",
        "it's",
        '"',
        "\\",
        "$HOME",
        "$(echo no)",
        "`echo no`",
        "a\nb\n",
        "*",
        "~",
        "-n",
        "--",
        "a=b",
        "é 日本 🎉",
    ]
    outcome = host.run(Q35, guest.command("printf", "<%s>\n", *words))
    assert "".join(f"<{word}>\n" for word in words) in outcome.console
    assert outcome.exit == 0
    assert outcome.clean


def test_the_environment_is_what_was_written_and_nothing_else(host: Host) -> None:
    environment = [
        "PATH=/nowhere:/bin",
        "QUOTES='\"`$(echo no)\\",
        "EMPTY=",
        "A.NAME=a b",
        "init_run=/x",
        "PWD=x",
        "IFS=e",
    ]
    outcome = host.run(Q35, guest.command("env", environment=environment))
    reported = [line for line in outcome.lines if "=" in line and not line.startswith("[")]  # [ is the kernel's
    assert sorted(reported) == sorted(["HOME=/root", *environment]), outcome.console


def test_a_signal_to_init_reaches_the_entrypoint(host: Host) -> None:
    script = "trap 'exit 7' TERM; trap 'echo got INT; kill -TERM 1' INT; kill -INT 1; while :; do sleep 0.1; done"
    outcome = host.run(Q35, shell(script))
    assert "got INT" in outcome.lines
    assert outcome.exit == 7
    assert outcome.clean


@pytest.mark.parametrize(
    ("config", "status", "error"),
    [
        pytest.param(shell("exit 3"), 3, None, id="status-3"),
        pytest.param(shell("kill -KILL $$"), 137, None, id="killed"),
        pytest.param(guest.command("nginx"), 127, "entrypoint nginx not found (PATH is /bin)", id="not-found"),
        pytest.param("", 125, "nothing to run (", id="empty-config"),
        pytest.param("CMD='\n", 125, "config.sh is broken (/run/config/config.sh: line 2: syntax error", id="syntax"),
        pytest.param("exit 0\n", 125, "config.sh is broken (it ends the shell", id="config-that-exits"),
    ],
)
def test_how_it_ended_is_told_in_one_line(host: Host, config: str, status: int, error: str | None) -> None:
    outcome = host.run(Q35, config)
    assert outcome.exit == status, outcome.console
    assert outcome.clean, outcome.console
    assert len(outcome.errors) == (error is not None)
    assert all(line.startswith(str(error)) for line in outcome.errors)


def test_a_missing_disk_is_named(host: Host) -> None:
    disks = host.disks(Q35, shell("true"))
    del disks["overlay"]
    outcome = host.boot(Q35, disks)
    assert outcome.errors == ("missing disk: overlay (waited 5 s, and there is: vda vdb)",)
    assert outcome.exit == 125
    assert outcome.clean


def test_a_machine_that_cannot_switch_itself_off_ends_by_a_reset(host: Host) -> None:
    outcome = host.boot(MICROVM_WITHOUT_ACPI, {})
    assert "missing disk: rootfs overlay config" in outcome.console
    assert "reboot: Restarting system" in outcome.console
    assert outcome.clean
