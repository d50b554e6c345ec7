"""A guest that was saved, and restored after the defaults moved, boots again with the kernel and init it began with.

What is proven, on q35 and on aarch64's virt alike: QEMU restores a saved machine whatever kernel and initrd it is
given, for the guest's memory is in the saved file (the negative control). At the machine's next reset, though, it boots
the files that were given, and then a guest has its own kernel and init only if these were its own files. Kernel and
init are told by the guest: /proc/version, and the digests of /init and of all modules in its initrd.

What is not proven: that other hypervisors load the files at a reset. Cloud Hypervisor and Firecracker are not run here.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from systemfiles import BootFiles, SourceUnavailable, SystemFiles
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.cpioreader import read
from systemfiles.foundation.lockfile import read_lock
from tests.conftest import Provisioned
from tests.integration.support import completed, copy_data_dir

from .guest import Host, shell
from .qemu import Q35, VIRT, Machine
from .snapshots import Guest, running

pytestmark = [pytest.mark.boot, pytest.mark.network]

NAME = "before-the-update"

# PID 1 has the initrd for its root, even when the image's lies over it.
REPORT = r"""
cd /proc/1/root
echo "kernel: $(cat /proc/version)"
files=$(busybox find init etc/modules lib/modules -type f | busybox sort)
echo "init: $(busybox sha256sum $files | busybox sha256sum | cut -d' ' -f1)"
beat=0
while :; do
    echo "beat $((beat += 1))"
    sleep 0.2
done
"""


class Identity(NamedTuple):
    """What a guest tells of its kernel and its initrd, or what their files say of themselves."""

    kernel: str
    init: str


def identity_of(files: BootFiles) -> Identity:
    banner = re.search(rb"Linux version \d[^\0\n]* #\d[^\0\n]*", files.kernel.path.read_bytes())
    assert banner
    content = io.BytesIO(gzip.decompress(files.initrd.path.read_bytes()))
    sums = [
        f"{hashlib.sha256(record.data).hexdigest()}  {record.name}\n"
        for record in sorted(read(content), key=lambda record: record.name)
        if isinstance(record.data, bytes)
        and record.type == stat.S_IFREG
        and re.match(r"(init|etc/modules)$|lib/modules/", record.name)
    ]
    return Identity(banner[0].decode(), hashlib.sha256("".join(sums).encode()).hexdigest())


def told_by(guest: Guest) -> Identity:
    return Identity(guest.line("kernel: (.*)"), guest.line("init: (.*)"))


def beat_of(guest: Guest) -> int:
    """How often its entrypoint has gone round; it is alive if there is a next time."""
    guest.skip()
    return int(guest.line(r"beat (\d+)"))


@pytest.fixture
def data_dir(provisioned: Provisioned, tmp_path: Path) -> Iterator[Path]:
    target = tmp_path / "copied"
    copy_data_dir(provisioned.data_dir, target)
    yield target
    shutil.rmtree(target)


@pytest.mark.parametrize("machine", [Q35, VIRT], ids=str)
def test_a_guest_restored_after_the_defaults_moved_boots_again_with_what_it_was_saved_with(
    machine: Machine, host: Host, data_dir: Path
) -> None:
    first = SystemFiles(data_dir, profile="debian", arch=machine.arch).resolve()
    disks = host.disks(machine, shell(REPORT))
    saved = host.directory / "saved"
    with running(machine, first, disks) as guest:
        assert told_by(guest) == identity_of(first)
        hypervisor, beat = guest.hypervisor, beat_of(guest)
        guest.save(saved)
    others = [copy_of(disks, host.directory / name) for name in ("new", "control")]
    SystemFiles(data_dir).pin(NAME, first, hypervisor=hypervisor)

    system, second = move_defaults(data_dir, machine.arch, host.directory)
    assert identity_of(second).init != identity_of(first).init
    assert (identity_of(second).kernel == identity_of(first).kernel) == (second.kernel.version == first.kernel.version)
    system.collect(grace=0, keep_last=0)
    shutil.rmtree(first.kernel.path.parent)  # what the pin holds can be brought back
    restored = system.restore(NAME, hypervisor=hypervisor, full=True)
    assert restored == first

    with (
        running(machine, second, others[0]) as new,
        running(machine, restored, disks, saved=saved) as old,
    ):
        old.resume()
        assert beat_of(old) > beat
        assert told_by(new) == identity_of(second)
        old.reset()
        assert told_by(old) == identity_of(first)
        assert beat_of(old) < beat_of(old)  # both live, side by side
        assert beat_of(new) < beat_of(new)

    with running(machine, second, others[1], saved=saved) as control:
        control.resume()
        assert beat_of(control) > beat
        control.reset()
        assert told_by(control) == identity_of(second)

    system.unpin(NAME)
    gone = {each.what for each in system.collect(grace=0, keep_last=0).gone}
    assert names_of(first) - names_of(second) <= gone  # only the pin held them


def names_of(files: BootFiles) -> set[str]:
    return {f"{kind}-{part.version}-{part.arch}" for kind, part in files._asdict().items()}


def copy_of(disks: Mapping[str, Path], directory: Path) -> dict[str, Path]:
    directory.mkdir()
    return {name: Path(shutil.copy(path, directory / path.name)) for name, path in disks.items()}


def move_defaults(data_dir: Path, arch: str, directory: Path) -> tuple[SystemFiles, BootFiles]:
    """Lets the profile's kernel be another package, where apt has one, and its initrd one with fewer modules."""
    lock = read_lock(data_dir / "system" / "versions.lock")
    package = lock.kernel[lock.rolling["debian-cloud"][Arch(arch)]][Arch(arch)].package
    catalog = directory / "catalog.toml"
    for name in kernels_beside(package.removesuffix(Arch(arch).debian)):
        apt = ", ".join(f'{each} = "{name}{each.debian}"' for each in Arch)
        catalog.write_text(
            f"schema = 1\n[kernel.debian-cloud]\napt = {{ {apt} }}\n"
            '[initrd."v1.0.0-debian"]\ninit = "v1.0.0"\nbusybox = { apt = "busybox-static" }\n'
            'load = ["virtio_pci", "virtio_blk", "overlay"]\n'
        )
        system = SystemFiles(data_dir, catalog=catalog, profile="debian", arch=arch)
        with contextlib.suppress(SourceUnavailable):  # it is not there for this architecture
            system.provisioner().update("debian-cloud", "v1.0.0-debian", Arch(arch))
            return system, system.resolve()
    raise AssertionError


def kernels_beside(package: str) -> list[str]:
    """Other kernels like it that the host's apt knows, newest first, then itself; all without an architecture."""
    own = Arch.host().debian
    known = completed(["apt-cache", "pkgnames", "linux-image-"]).stdout.split()
    others = [name.removesuffix(own) for name in known if re.fullmatch(rf"linux-image-\d.*-cloud-{own}", name)]
    newest = sorted(others, key=lambda name: [*map(int, re.findall(r"\d+", name))], reverse=True)
    return [*(name for name in newest if name != package), package]
