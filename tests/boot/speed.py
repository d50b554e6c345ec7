"""How long a guest takes from init's first line to its entrypoint, and a plain script for the same steps.

Both are booted with the same kernel, emulator, disks, busybox and modules: a second cpio behind the initrd that was
provisioned makes the kernel replace /init. The guest has a network, a user with groups, a hostname and a directory to
be made; no volumes.

QEMU counts instructions, and the guest's clock is that count: each takes 1 ns, and a guest that sleeps until its next
timer gets there at once (`-icount shift=0,sleep=off`). One that waits for a disk must not, so it polls (`idle=poll`, on
Arm `nohlt`). What is left for a busy host to change is how long that is: 1 or 2 % of the whole.

Both ends are told by the kernel's own clock. The kernel notes when it runs /init. To note when the entrypoint runs,
that writes to /dev/kmsg, and then reads both notes. An ordinary user may do neither, so it inherits two descriptors
that config.sh opens. Nothing is added to either script, and nothing to the console, which takes its time.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from systemfiles.bootfiles import BootFiles
from systemfiles.foundation import cpio
from systemfiles.recipes.guestconfig import Network

from . import qemu
from .guest import Host, shell
from .qemu import Q35, VIRT, Machine, Outcome

PLAIN = (Path(__file__).parent.parent / "bench" / "plain-init.sh").read_bytes()
"""With a sleep, and a trace of each command on the console."""
QUICK = PLAIN.replace(b"set -x\n", b"").replace(b"sleep 0.5\n", b"")
"""Without them."""

_COUNTED = ("-icount", "shift=0,sleep=off")
COUNTED = (
    replace(Q35, options=(*Q35.options, *_COUNTED), arguments=f"{Q35.arguments} idle=poll"),
    replace(VIRT, options=(*VIRT.options, *_COUNTED), arguments=f"{VIRT.arguments} nohlt"),
)
"""Machines whose clock counts instructions."""

MOST_FORKS = 25
# The kernel numbers processes in turn, and its own threads with them. The reader is the first that init starts.
_SCRIPT = """echo entrypoint >&9
grep -m 2 -e 'Run /init' -e ';entrypoint' <&8
for status in /proc/[0-9]*/stat; do
    read -r pid name _ parent _ <$status
    [ $parent -eq 1 ] && [ "$name" = "(init)" ] && echo "forks: $(($$ - pid + 1))"
done
"""
_NOTES = "exec 8</dev/kmsg 9>/dev/kmsg\n"
_NETWORK = Network("10.0.2.15/24", gateway=qemu.HOST, dns=["10.0.2.3"])

# Loads the modules before init's first line, as if the kernel had it all built in.
_BEFORE = b"""#!/bin/sh
export PATH=/bin:/sbin
mount -t proc proc /proc
mount -t devtmpfs devtmpfs /dev
modprobe -a $(cat /etc/modules)
: >/etc/modules
exec 7>/dev/kmsg
umount -l /dev
umount /proc
echo 'Run /init' >&7
exec 7>&-
exec /init
"""


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds from init's first line to the entrypoint, and how many processes and threads began in between."""

    seconds: float
    forks: int


def start(
    host: Host, machine: Machine, init: bytes | None = None, *, network: bool = True, built_in: bool = False
) -> Start:
    """One boot with the init that is shipped, or another. `built_in`: the time to load modules does not count."""
    config = shell(
        _SCRIPT,
        user="web",
        workdir="/srv/work",
        hostname="guest",
        network=_NETWORK if network else None,
    )
    disks = host.disks(machine, config.script().decode() + _NOTES)
    replaced = ({} if init is None else {"init": init}) | ({"before": _BEFORE} if built_in else {})
    files = with_scripts(host.provisioned.boot_files(machine.arch), replaced, host.directory / "initrd")
    arguments = "rdinit=/before" if built_in else ""
    # Polling through the plain script's sleep takes a busy host minutes.
    return _told(qemu.boot(machine, files, disks, network=network, arguments=arguments, limit=900))


def with_scripts(files: BootFiles, scripts: Mapping[str, bytes], path: Path) -> BootFiles:
    """The same files, but for an initrd at `path` in which `scripts` replace what has their names."""
    with path.open("wb") as out:
        out.write(files.initrd.path.read_bytes())
        with gzip.open(out, "wb") as appended:
            cpio.write(cpio.normalise(cpio.file(name, text, mode=0o755) for name, text in scripts.items()), appended)
    return files._replace(initrd=files.initrd._replace(path=path))


def _told(outcome: Outcome) -> Start:
    notes = re.findall(r"^\d+,\d+,(\d+),[^;]*;(?:Run /init|entrypoint)", outcome.console, re.MULTILINE)
    forks = re.findall(r"^forks: (\d+)$", outcome.console, re.MULTILINE)
    assert len(notes) == 2, outcome.console
    return Start((int(notes[1]) - int(notes[0])) / 1e6, int(forks[0]) if forks else 0)
