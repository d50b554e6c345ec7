"""Boots any OCI image: what holds in the guest of every image is looked at, and then the image runs, as it is.

The probe goes before the image's entrypoint and becomes it. If that is an init (`/sbin/init`, systemd), it is PID 1 and
nothing goes before it: then all that can be told is that it runs.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import replace

from systemfiles.content.images import Image
from systemfiles.foundation.errors import SourceRefused
from systemfiles.recipes import contract, probe
from systemfiles.recipes.bootreport import ENDING, Report, brief
from systemfiles.recipes.disks import write_config_disk, write_overlay_disk, write_rootfs_disk
from systemfiles.recipes.guestconfig import GuestConfig
from systemfiles.recipes.guests import Guest, Guests

_OVERLAY = 1 << 30
_MEMORY = 512  # MiB
_GRACE = 10.0  # seconds from when an entrypoint is asked to end
_PROBING = 30.0  # seconds for the probe's own part, at most
_SETTLE = 1.0  # seconds for what systemd says right after it has started everything
_NOT_RUN = (126, 127)
_SYSTEMD_STARTED = re.compile(r"Startup finished in [^\r\n]*")
_NOT_OF_THE_KERNEL = re.compile(r"^(?!\[ *\d+\.\d+\] |systemfiles: )[^\n]*\w[^\n]*$", re.MULTILINE)
# It tells on the console what it does. Without udev in the image, its getty there would wait 90 s for the device.
_SYSTEMD = (
    "systemd.show_status=true systemd.journald.forward_to_console=1 "
    "systemd.mask=serial-getty@ttyS0.service systemd.mask=serial-getty@ttyAMA0.service"
)


def check_image(guests: Guests, image: Image) -> Report:
    """Raises InvalidArchive for what is no image, SourceRefused for a configuration that no guest can do."""
    config = GuestConfig.from_image(image.config, subject=image.reference)
    words = [*config.entrypoint, *config.cmd]
    if not words:
        raise SourceRefused(image.reference, "its configuration names nothing to run")
    write_rootfs_disk(guests.disk("rootfs"), image.layers, progress=guests.progress)
    write_overlay_disk(guests.disk("overlay"), _OVERLAY)
    notes = [_note("image", f"{image.reference} ({image.digest})"), _note("entrypoint", shlex.join(words))]
    check = _check_init if config.init_mode else _check_entrypoint
    return check(guests, config, notes)


def _check_entrypoint(guests: Guests, config: GuestConfig, notes: list[str]) -> Report:
    write_config_disk(guests.disk("config"), guests.probe.before(config, guests.limit))
    write_rootfs_disk(guests.disk("probe"), [guests.probe.volume(config)])
    disks = guests.disks("probe", "config", "rootfs", "overlay")
    guest = guests.boot(
        *("the image", disks),
        times={guests.probe.told("started"): guests.limit + _PROBING, guests.probe.told("time"): _GRACE},
        locked=["rootfs", "config", "probe"],
        network=True,
        memory=_MEMORY,
    )
    seconds = contract.init_seconds(guest.facts)
    guests.findings.leave_out(9)
    if guests.has_started(guest):
        contract.check_any(guests.findings, guest.facts, guests.probe.modules, disks)
        contract.check_network(guests.findings, guest.facts, guests.probe.nonce)
        contract.check_image(guests.findings, guest.facts, config)
        if guest.outcome.exit in _NOT_RUN:
            guests.noted(guest)
            guest = _alone(guests, config)
        if not guests.has_errors(guest):
            notes.append(_note("it", _end(guests, guest)))
    guests.noted(guest)
    return guests.report(seconds, notes)


def _alone(guests: Guests, config: GuestConfig) -> Guest:
    """The image without the probe, which could not run its entrypoint: init knows why, or that it can be run."""
    write_config_disk(guests.disk("config"), replace(config, hostname=probe.HOSTNAME, network=probe.NETWORK))
    write_overlay_disk(guests.disk("overlay-2"), _OVERLAY)
    disks = guests.disks("config", "rootfs") | {"overlay": guests.disk("overlay-2")}
    return guests.boot("without the probe", disks, locked=["rootfs", "config"], network=True, memory=_MEMORY)


def _end(guests: Guests, guest: Guest) -> str:
    """How the entrypoint ended. That a guest is stopped as its entrypoint runs on is no fault of anybody's."""
    outcome, late = guest.outcome, guests.probe.told("time") in guest.met
    runs_on = f"still ran after {guests.limit:g} s"
    if outcome.status is None and late:
        guests.findings.expect(ENDING, "the kernel", "no panic", outcome.panic or "no panic")
        return f"{runs_on}, and {_GRACE:g} s after it was asked to end: stopped"
    contract.check_ending(guests.findings, outcome, None)
    if outcome.exit is None:
        return "did not end as it should"
    ended = f"ended with the status {outcome.exit}"
    return f"{runs_on}; asked to end, it {ended}" if late else ended


def _check_init(guests: Guests, config: GuestConfig, notes: list[str]) -> Report:
    config = replace(config, init_mode="systemd", hostname=probe.HOSTNAME, network=probe.NETWORK)
    write_config_disk(guests.disk("config"), config)
    guest = guests.boot(
        "the image, whose init is PID 1",
        guests.disks("config", "rootfs", "overlay"),
        times={_NOT_OF_THE_KERNEL: guests.limit, _SYSTEMD_STARTED: _SETTLE},
        locked=["rootfs", "config"],
        network=True,
        arguments=_SYSTEMD,
        memory=_MEMORY,
    )
    outcome = guest.outcome
    for step in range(1, 9):
        guests.findings.leave_out(step)  # only a probe could tell
    if not guests.has_errors(guest):
        said = _NOT_OF_THE_KERNEL.search(outcome.console)
        guests.findings.expect(9, "what the image's init writes", "something", "something" if said else None)
        guests.findings.expect(ENDING, "the exit marker of the initrd's init", None, outcome.exit)
        how = "was stopped" if outcome.status is None else "switched the machine off"
        finished = _SYSTEMD_STARTED.search(outcome.console)
        notes.append(_note("it", f"{how} after {outcome.seconds:.1f} s" + (f"; {finished[0]}" if finished else "")))
    guests.noted(guest)
    return guests.report(None, notes)


def _note(name: str, text: str) -> str:
    return f"{name:<10}  {brief(text)}"
