"""Boots a kernel and an initrd, and checks the guest contract step by step.

Without an image there are four boots of the probe's own::

    full         as root, with all that a guest may be told to use, its disks out of order but with serials
    user         as a user by name, on the same overlay, its disks known by their order
    systemd      as PID 1
    failure      told to run what is not there

What is done with an image is in imagecheck.py.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, Unpack

from systemfiles.bootfiles import BootFiles
from systemfiles.content.images import Image
from systemfiles.foundation.digest import hash_file
from systemfiles.foundation.errors import StoreError, ToolFailed, UsageError
from systemfiles.foundation.files import scratch_dir, write_file
from systemfiles.foundation.paths import Paths
from systemfiles.foundation.progress import Progress, silent
from systemfiles.recipes import contract, probe, qemu
from systemfiles.recipes.bootreport import ENDING, Report
from systemfiles.recipes.disks import needs_recovery, write_config_disk, write_overlay_disk, write_rootfs_disk
from systemfiles.recipes.guestconfig import GuestConfig
from systemfiles.recipes.guests import Guest, Guests
from systemfiles.recipes.imagecheck import check_image

LIMIT = 60.0
"""How long, in seconds, an entrypoint may run."""
START = 120.0
"""How long, in seconds, a guest may take to start it. On an idle host that is done in three."""

_LIMIT_MAX = 86400
_NOT_FOUND = 127
_OVERLAY, _VOLUME = 16 << 20, 4 << 20


class Options(TypedDict, total=False):
    """As of `check_boot`."""

    image: Image | None
    accel: str
    limit: float
    start: float
    progress: Progress


def check_and_keep_log(
    files: BootFiles,
    paths: Paths,
    **options: Unpack[Options],
) -> Report:
    """`check_boot` in a temporary directory. When the contract does not hold, the serial log is kept: in the data
    directory, or where temporary files are if that cannot be written. Raises as `check_boot`.
    """
    name = f"boot-{files.kernel.version}-{files.initrd.version}-{files.kernel.arch}"
    with _work_in(paths) as directory:
        log = directory / "serial.log"
        try:
            report = check_boot(files, directory, **options)
        except ToolFailed:
            if log.exists():
                _keep(log, name, paths)
            raise
        return report if report.holds else replace(report, log=_keep(log, name, paths))


@contextmanager
def _work_in(paths: Paths) -> Iterator[Path]:
    """A directory for disks, which may be large: in the data directory or, where that cannot be written, elsewhere."""
    with ExitStack() as stack:
        try:
            directory = stack.enter_context(scratch_dir(paths.tmp))
        except StoreError:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="systemfiles-boot-")))
        yield directory


def check_boot(
    files: BootFiles,
    directory: Path,
    *,
    image: Image | None = None,
    accel: str = "tcg",
    limit: float = LIMIT,
    start: float = START,
    progress: Progress = silent,
) -> Report:
    """Boots this pair in QEMU, with `image` or without, and says for each step of the contract whether it holds.

    A guest has `start` seconds to start its entrypoint, and that has `limit` to end; an image that runs on is asked to.
    `directory` takes the disks, and serial.log with all that the guests write, as they do. Whatever they do is no
    error, but in the report. Raises ToolMissing without QEMU, UsageError for an acceleration that cannot be used,
    InvalidArchive for an initrd without a busybox or an image that is none, SourceRefused for an image whose
    configuration no guest can do, ToolFailed when QEMU fails, NoSpace, StoreError, and whatever `progress` raises.
    """
    qemu.require_usable(qemu.machine_for(files.kernel.arch), accel)
    if not 0 < limit <= _LIMIT_MAX:
        msg = f"{limit:g} s is no time for an entrypoint to run"
        raise UsageError(msg, hint=f"it is more than none, and {_LIMIT_MAX} s at most")
    guests = Guests(files, directory, accel=accel, limit=limit, start=start, progress=progress)
    return check_image(guests, image) if image else _check_probe(guests)


def _check_probe(guests: Guests) -> Report:
    write_rootfs_disk(guests.disk("rootfs"), [guests.probe.image()])
    write_overlay_disk(guests.disk("overlay"), _OVERLAY)
    first = _full(guests)
    if "full" in first.facts:
        _user(guests)
        _systemd(guests)
        _failure(guests)
    return guests.report(contract.init_seconds(first.facts))


def _full(guests: Guests) -> Guest:
    config = guests.probe.full()
    write_config_disk(guests.disk("config"), config)
    for name in ("reference", "data", "template"):
        content = probe.layer({"value": f"{probe.AS_DELIVERED}\n".encode()})
        write_rootfs_disk(guests.disk(name), [content], size=_VOLUME)
        guests.disk(name).chmod(0o600)
    write_overlay_disk(guests.disk("changes"), _VOLUME)
    # by their letters, each would be another
    disks = guests.disks("config", "template", "rootfs", "reference", "data", "overlay", "changes")
    unchanging = {"rootfs": 3, "config": 4, "reference": 6, "template": 6}
    guests.disk("rootfs").chmod(0o600)  # the guest could write to it, and must not
    before = {name: hash_file(disks[name]) for name in unchanging}
    guest = guests.boot("as root, with everything", disks, network=True)
    findings, facts = guests.findings, guest.facts
    if guests.has_started(guest) and "full" not in facts:
        findings.expect(ENDING, "what the probe tells", "everything", f"nothing after {[*facts][-1]}")
        contract.check_ending(findings, guest.outcome, probe.STATUS)
    elif guest.started:
        contract.check_any(findings, facts, guests.probe.modules, disks)
        contract.check_network(findings, facts, guests.probe.nonce)
        contract.check_full(findings, facts, guests.probe, config)
        contract.check_ending(findings, guest.outcome, probe.STATUS)
        _expect_settled(guests)
        for name, step in unchanging.items():
            after = "as before" if hash_file(disks[name]) == before[name] else "changed"
            findings.expect(step, f"the {name} disk, which is only to be read", "as before", after)
    return guests.noted(guest)


def _user(guests: Guests) -> None:
    write_config_disk(guests.disk("config"), guests.probe.user())
    guest = guests.boot("as a user", guests.disks("rootfs", "overlay", "config"), serials=False)
    if guests.has_started(guest):
        contract.check_user(guests.findings, guest.facts, guests.probe)
        contract.check_ending(guests.findings, guest.outcome, 0)
        _expect_settled(guests)
    guests.noted(guest)


def _systemd(guests: Guests) -> None:
    write_config_disk(guests.disk("config"), guests.probe.systemd())
    guest = guests.boot("as PID 1", guests.disks("rootfs", "overlay", "config"))
    if guests.has_started(guest, step=9):
        contract.check_systemd(guests.findings, guest.facts, guests.probe)
        guests.findings.expect(9, "the kernel", "no panic", guest.outcome.panic or "no panic")
        guests.findings.expect(9, "the machine, which its init switches off", "switched off", guest.outcome.ending)
    guests.noted(guest)


def _failure(guests: Guests) -> None:
    """A guest that cannot do as it is told, and has to say so in one line."""
    missing = "/no/such/program"
    write_config_disk(guests.disk("config"), GuestConfig(entrypoint=[missing]))
    guest = guests.boot("with an entrypoint that is missing", guests.disks("rootfs", "overlay", "config"))
    errors = guest.outcome.errors
    expected = f"one line about {missing}"
    seen = expected if len(errors) == 1 and missing in errors[0] else "; ".join(errors) or None
    guests.findings.expect(ENDING, "what init says", expected, seen)
    contract.check_ending(guests.findings, guest.outcome, _NOT_FOUND)
    guests.noted(guest)


def _expect_settled(guests: Guests) -> None:
    """Whether the overlay disk, which the guest wrote to, was left without a journal to replay."""
    left = "a journal to replay" if needs_recovery(guests.disk("overlay")) else "whole"
    guests.findings.expect(ENDING, "the overlay disk", "whole", left)


def _keep(log: Path, name: str, paths: Paths) -> Path:
    """A copy of the serial log that stays."""
    content = log.read_bytes()
    kept = paths.boot_log(name)
    try:
        write_file(kept, content, scratch=paths.tmp, mode=0o600)
    except StoreError:  # which a full disk is, too
        fd, temporary = tempfile.mkstemp(prefix=f"systemfiles-{name}-", suffix=".log")
        with os.fdopen(fd, "wb") as file:
            file.write(content)
        return Path(temporary)
    return kept
