"""What `doit profile=debian arch=x86_64,aarch64` made, booted as it is: machines, disks and root file systems."""

from __future__ import annotations

import os
import re
from dataclasses import replace

import pytest

from systemfiles.recipes.guestconfig import GuestConfig, Network

from . import qemu
from .guest import Host, shell
from .qemu import MACHINES, MICROVM_WITHOUT_ACPI, Q35, VIRT, VIRT_MMIO, Machine

pytestmark = pytest.mark.boot


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_the_entrypoint_runs_and_its_end_is_the_end_of_the_machine(host: Host, machine: Machine) -> None:
    """Its disks are known by their letters."""
    script = 'echo "I am $(readlink /proc/self/exe), root is $(grep -o ^overlay /proc/mounts)"'
    disks = host.disks(machine, shell(script))
    if machine is VIRT_MMIO:
        disks = dict(reversed(disks.items()))
    outcome = host.boot(machine, disks, serials=False)
    assert "I am /bin/busybox, root is overlay" in outcome.lines, outcome.console
    assert outcome.exit == 0, outcome.console
    assert outcome.errors == ()
    assert outcome.clean, outcome.console
    assert outcome.ending == ("reset" if machine is MICROVM_WITHOUT_ACPI else "switched off")


def test_a_kernel_that_could_switch_off_ends_by_a_reset_where_nothing_does(host: Host) -> None:
    machine = replace(MICROVM_WITHOUT_ACPI, arguments="")
    outcome = qemu.boot(machine, host.provisioned.boot_files(machine.arch), {})
    assert "missing disk: rootfs overlay config" in outcome.console
    assert outcome.ending == "reset"
    assert outcome.clean


@pytest.mark.parametrize(
    ("machine", "arguments"),
    [
        (Q35, "reboot=k"),
        (Q35, "reboot=t"),
        (replace(MICROVM_WITHOUT_ACPI, arguments=""), ""),  # there it needs no asking
        (replace(MICROVM_WITHOUT_ACPI, arguments=""), "reboot=k"),
    ],
    ids=str,
)
def test_the_command_line_can_ask_for_a_reset(host: Host, machine: Machine, arguments: str) -> None:
    outcome = host.run(machine, shell("exit 5"), arguments=arguments)
    assert outcome.exit == 5, outcome.console
    assert outcome.ending == "reset"
    assert outcome.clean


def test_a_kernel_with_everything_built_in_needs_no_modules(host: Host) -> None:
    script = (
        "ls -d /proc/modules /sys/firmware/acpi /sys/bus/pci /proc/1/root/lib/modules; grep -c ^nodev /proc/filesystems"
    )
    outcome = host.run(MICROVM_WITHOUT_ACPI, shell(script))
    assert outcome.console.count(": No such file or directory") == 4, outcome.console
    assert outcome.exit == 0
    assert outcome.clean


def test_the_guest_writes_to_the_overlay_alone_and_finds_it_again(host: Host) -> None:
    disks = host.disks(Q35, shell("cat /kept && exit; echo 'from the first boot' >/kept; echo nothing yet"))
    before = {name: disks[name].read_bytes() for name in ("rootfs", "config")}
    first, second = host.boot(Q35, disks), host.boot(Q35, disks)
    assert "nothing yet" in first.lines
    assert "from the first boot" in second.lines
    assert first.clean
    assert second.clean
    assert {name: disks[name].read_bytes() for name in before} == before


# The kernel numbers processes in turn, and its own threads with them. The reader is the first that init starts.
FORKS = """
for status in /proc/[0-9]*/stat; do
    read -r pid name _ parent _ <$status
    [ $parent -eq 1 ] && [ "$name" = "(init)" ] && echo "forks: $(($$ - pid + 1))"
done
"""


@pytest.mark.parametrize("machine", [Q35, VIRT], ids=str)
def test_there_are_at_most_25_forks_before_the_entrypoint(host: Host, machine: Machine) -> None:
    config = shell(FORKS, network=Network("10.0.2.15/24", gateway=qemu.HOST, dns=["10.0.2.3"]), hostname="guest")
    outcome = host.run(machine, config, network=True)
    (forks,) = (int(line.split(": ")[1]) for line in outcome.lines if line.startswith("forks: "))
    assert 3 < forks <= 25, outcome.console
    assert outcome.clean


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_an_image_needs_nothing_but_a_program(host: Host, machine: Machine) -> None:
    """No shell, no library, not even a directory, and not the user who is named by a number. Its disk is an erofs."""
    words = ("/od", "-An", "-v", "-tx1", "/proc/self/cmdline", "/proc/self/environ", "/proc/self/status")
    tree = {"od": host.provisioned.busybox(machine.arch)}
    outcome = replace(host, root_format="erofs").run(machine, GuestConfig(entrypoint=words, user="4321"), tree)
    dumped = bytes.fromhex("".join(line for line in outcome.lines if re.fullmatch("( [0-9a-f]{2}){1,16}", line)))
    assert outcome.exit == 0, outcome.console
    assert outcome.clean
    assert dumped.startswith(b"".join(os.fsencode(word) + b"\0" for word in words)), outcome.console
    assert b"\0HOME=/\0" in dumped
    assert b"\nUid:\t4321\t4321\t4321\t4321\nGid:\t0\t0\t0\t0\n" in dumped


def test_systemd_mode_makes_the_images_init_the_first_process(host: Host) -> None:
    init = b"""#!/bin/sh
echo "init is $$, $0 with $A, root is $(grep -o '^overlay / ' /proc/mounts)"
echo "left: $(cut -d' ' -f2 /proc/mounts | tr '\\n' ' ')"
mount -o remount,ro /
echo o >/proc/sysrq-trigger
while :; do sleep 1; done
"""
    tree = host.tree(Q35) | {"lib/init": init, "sbin/init": "/lib/init"}
    config = GuestConfig(init_mode="systemd", environment={"PATH": "/bin", "A": "an 'environment'"})
    outcome = host.run(Q35, config, tree)
    assert "init is 1, /sbin/init with an 'environment', root is overlay / " in outcome.lines, outcome.console
    # where the overlay disk is, this init can see it, and make it read-only at its end
    mounts = "left: /run/initramfs/overlay / /proc /sys /dev /dev/pts /dev/shm /sys/fs/cgroup /run "
    assert mounts in outcome.lines, outcome.console
    assert "reboot: Power down" in outcome.console
    assert outcome.status == 0
    assert "panic" not in outcome.console


def test_systemd_mode_needs_an_init_in_the_image(host: Host) -> None:
    outcome = host.run(Q35, GuestConfig(init_mode="systemd"))
    assert len(outcome.errors) == 1
    assert outcome.errors[0].startswith("entrypoint /sbin/init not found ("), outcome.console
    assert outcome.clean
