"""How quickly the entrypoint is reached: by a clock that counts instructions, so that a busy host spoils nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from . import speed
from .guest import Host
from .qemu import Q35, VIRT, Machine

pytestmark = pytest.mark.boot


@pytest.mark.parametrize("machine", speed.COUNTED, ids=str)
def test_init_takes_at_most_0_35_of_what_a_plain_script_takes(host: Host, machine: Machine) -> None:
    ours, plain = speed.start(host, machine), speed.start(host, machine, speed.PLAIN)
    assert ours.seconds <= 0.35 * plain.seconds, (ours, plain)


@pytest.mark.parametrize("machine", speed.COUNTED, ids=str)
def test_init_is_no_slower_than_a_plain_script_without_its_sleep_and_trace(host: Host, machine: Machine) -> None:
    """Most of what either takes is the kernel's, which loads modules. Waiting for disks makes some percent."""
    ours, quick = speed.start(host, machine), speed.start(host, machine, speed.QUICK)
    assert ours.seconds <= 1.05 * quick.seconds, (ours, quick)


@pytest.mark.parametrize("machine", [Q35, VIRT], ids=str)
@pytest.mark.parametrize("root_format", ["ext4", "erofs", "squashfs"])
def test_there_are_few_forks_before_the_entrypoint(host: Host, machine: Machine, root_format: str) -> None:
    host = replace(host, root_format=root_format)
    assert 3 < speed.start(host, machine).forks <= speed.MOST_FORKS
