"""Guests: from init's first line to the entrypoint beside a plain script, forks, and sizes of initrds.

How time is measured says tests/boot/speed.py. It is counted, not taken, so each figure is of one boot.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from measure import Comparison, Row, compared, process

sys.path.append(str(Path(__file__).parent.parent.parent))

from tests.boot import speed
from tests.boot.guest import Host
from tests.boot.qemu import Q35, VIRT, Machine
from tests.conftest import ARCHES, CHECKOUT, Provisioned

TOOLS = ("qemu-system-aarch64", "qemu-system-x86_64")
MOST_BYTES = 1_450_000


def rows(work: Path, environ: Mapping[str, str]) -> Iterator[Row]:
    """Sizes, forks and times; `work` is a directory for what that needs."""
    work = work / "guest"
    work.mkdir()
    data_dir = work / "data"
    words = [sys.executable, "-m", "doit", "profile=debian", f"arch={','.join(ARCHES)}", f"data_dir={data_dir}"]
    process(words, environ, cwd=CHECKOUT)()
    provisioned = Provisioned(data_dir)
    for arch in ARCHES:
        size = provisioned.boot_files(arch).initrd.size
        yield Row(f"initrd of profile debian, {arch}", f"{size} B", "", "", "≤ 1.45 MB", size <= MOST_BYTES)
    host = Host(provisioned, work)
    for machine in (Q35, VIRT):
        yield from _forks(host, machine)
    for machine in speed.COUNTED:
        yield from _times(host, machine)
    shutil.rmtree(data_dir)


def _forks(host: Host, machine: Machine) -> Iterator[Row]:
    for root_format in ("ext4", "erofs"):
        for what, network in (("network", True), ("no network", False)):
            forks = speed.start(replace(host, root_format=root_format), machine, network=network).forks
            met = forks <= speed.MOST_FORKS
            yield Row(f"forks, {machine}, {root_format}, {what}", str(forks), "", "", f"≤ {speed.MOST_FORKS}", met)


def _times(host: Host, machine: Machine) -> Iterator[Row]:
    def beside(alternative: bytes, *, built_in: bool = False) -> Comparison:
        ours, theirs = (speed.start(host, machine, init, built_in=built_in) for init in (None, alternative))
        return Comparison((ours.seconds,), (theirs.seconds,))

    what = f"init to entrypoint, {machine}"
    yield compared(what, beside(speed.PLAIN), "plain script, sleep 0.5, set -x", most=0.35)
    yield compared(what, beside(speed.QUICK), "plain script", most=0.75)
    yield compared(f"{what}, built-in drivers", beside(speed.QUICK, built_in=True), "plain script")
