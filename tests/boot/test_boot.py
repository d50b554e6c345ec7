"""What `doit profile=debian arch=x86_64,aarch64` made, booted as it is: machines, disks and root file systems."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from systemfiles.recipes.guestconfig import GuestConfig, Network

from . import qemu
from .guest import Host, shell
from .qemu import MACHINES, MICROVM_WITHOUT_ACPI, Q35, VIRT, VIRT_MMIO, Machine

pytestmark = pytest.mark.boot


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_the_entrypoint_runs_and_its_end_switches_the_machine_off(host: Host, machine: Machine) -> None:
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


def test_a_machine_that_cannot_switch_itself_off_ends_by_a_reset(host: Host) -> None:
    outcome = host.boot(MICROVM_WITHOUT_ACPI, {})
    assert "missing disk: rootfs overlay config" in outcome.console
    assert "reboot: Restarting system" in outcome.console
    assert outcome.clean


@pytest.mark.parametrize("arguments", ["reboot=k", "reboot=t"])
def test_the_command_line_can_ask_for_a_reset(host: Host, arguments: str) -> None:
    outcome = host.run(Q35, shell("exit 5"), arguments=arguments)
    assert outcome.exit == 5, outcome.console
    assert "reboot: Restarting system" in outcome.console
    assert outcome.clean


@pytest.mark.parametrize("machine", [Q35, VIRT], ids=str)
@pytest.mark.parametrize("root_format", ["erofs", "squashfs"])
def test_the_root_may_be_of_another_format(host: Host, machine: Machine, root_format: str) -> None:
    host = replace(host, root_format=root_format)
    outcome = host.run(machine, shell("grep -c busybox /bin/busybox; echo >/new; cat /etc/passwd"))
    assert "root:x:0:0:root:/root:/bin/sh" in outcome.lines, outcome.console
    assert outcome.clean, outcome.console
    assert outcome.exit == 0


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


def test_an_image_needs_nothing_but_a_program(host: Host) -> None:
    """No shell, no library, no user, not even a directory."""
    words = ("/od", "-An", "-v", "-tx1", "/proc/self/cmdline", "/proc/self/environ")
    outcome = host.run(Q35, GuestConfig(entrypoint=words), {"od": host.provisioned.busybox(Q35.arch)})
    dumped = "".join(
        line for line in outcome.lines if (line.startswith(" ") and len(line) == 48) or line.startswith(" 2")
    )
    assert outcome.exit == 0, outcome.console
    assert b"\0".join(map(os.fsencode, words)) in bytes.fromhex(dumped), outcome.console
    assert b"HOME=/root" in bytes.fromhex(dumped)


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
