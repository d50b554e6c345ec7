"""What things are called: disks, by their serials before their letters, and the entrypoint, as it was given."""

from __future__ import annotations

from dataclasses import replace

import pytest

from systemfiles.recipes.guestconfig import GuestConfig

from . import qemu
from .guest import Entry, Host, shell
from .qemu import Q35
from .speed import with_scripts

pytestmark = pytest.mark.boot

# Takes our disks away before init starts, and gives them back one second later.
LATE = """#!/bin/sh
export PATH=/bin:/sbin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
modprobe -a $(cat /etc/modules)
taken=
for disk in /sys/block/vd*; do
    read -r serial <$disk/serial
    case $serial in
        rootfs | overlay | config)
            device=$(readlink -f $disk/device)
            {take}
            ;;
    esac
done
cd {back}
(sleep 1; {give}) &
umount -l /dev
umount -l /sys
umount -l /proc
exec /init
"""
UNBOUND = {
    "take": 'taken="$taken ${device##*/}"; echo ${device##*/} >/sys/bus/virtio/drivers/virtio_blk/unbind',
    "back": "/sys/bus/virtio/drivers/virtio_blk",
    "give": "for device in $taken; do echo $device >bind; done",
}
UNPLUGGED = {"take": "echo 1 >$device/../remove", "back": "/sys/bus/pci", "give": "echo 1 >rescan"}


@pytest.mark.parametrize(
    ("how", "others"),
    [
        pytest.param(UNBOUND, "", id="not-ready"),
        pytest.param(UNPLUGGED, ",serial={}", id="plugged-in"),
    ],
)
def test_disks_that_come_late_are_not_taken_for_those_that_have_their_letters(
    host: Host, how: dict[str, str], others: str
) -> None:
    """There are three volumes first; what is written to one in place of the overlay disk would be lost to its owner."""
    volumes = [host.volume(name, {"value": (b"as delivered\n", 0o644)}) for name in ("one", "two", "three")]
    before = [path.read_bytes() for path in volumes]
    words: list[str] = []
    for path in volumes:
        words += ["-drive", f"if=none,format=raw,id={path.name},file={path}"]
        words += ["-device", f"virtio-blk-pci,drive={path.name}{others.format(path.name)}"]
    machine = replace(Q35, options=(*Q35.options, *words))
    script = LATE
    for name, value in how.items():
        script = script.replace(f"{{{name}}}", value)
    files = host.provisioned.boot_files(machine.arch)
    scripts = {"before": script.encode()}
    disks = host.disks(machine, shell("echo started"))
    files = with_scripts(files, scripts, host.directory / "initrd")
    outcome = qemu.boot(machine, files, disks, arguments="rdinit=/before")
    assert "started" in outcome.lines, outcome.console
    assert outcome.clean, outcome.console
    assert [path.read_bytes() for path in volumes] == before


def test_a_volume_with_a_serial_is_nothing_else_whatever_its_letter(host: Host) -> None:
    disks = {name: host.volume(name, {}) for name in ("one", "two", "three")}
    before = [path.read_bytes() for path in disks.values()]
    outcome = host.boot(Q35, disks)
    (error,) = outcome.errors
    assert error == "missing disk: rootfs overlay config (waited 5 s, and there is: vda vdb vdc)", outcome.console
    assert outcome.clean, outcome.console
    assert [path.read_bytes() for path in disks.values()] == before


@pytest.mark.parametrize("user", ["", "web", "web:logs", "1000:7", "4321", "4321:logs"])
def test_the_first_word_arrives_as_it_was_given_whoever_it_runs_as(host: Host, user: str) -> None:
    config = GuestConfig(
        entrypoint=["cat", "/proc/self/cmdline"], environment={"PATH": "/none:/bin", "A.B": "x"}, user=user
    )
    outcome = host.run(Q35, config)
    assert "cat\0/proc/self/cmdline\0" in outcome.lines, outcome.console
    assert (outcome.exit, outcome.clean) == (0, True), outcome.console


def test_the_first_word_arrives_as_it_was_given_in_an_image_with_nothing_but_a_program(host: Host) -> None:
    tree: dict[str, Entry] = {"cat": host.provisioned.busybox(Q35.arch)}
    outcome = host.run(Q35, GuestConfig(entrypoint=["cat", "/proc/self/cmdline"], environment={"PATH": "/"}), tree)
    assert "cat\0/proc/self/cmdline\0" in outcome.lines, outcome.console
    assert (outcome.exit, outcome.clean) == (0, True), outcome.console
