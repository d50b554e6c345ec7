"""What tests of collections share."""

from __future__ import annotations

from systemfiles import Collection
from tests.retention.conftest import Host
from tests.retention.plain import REF_NAME

KERNEL, INITRD = "kernel-k-1-x86_64", "initrd-i-1-x86_64"
PAIR = {KERNEL, INITRD}
DEFAULTS = {"kernel-steady-x86_64", "initrd-plain-x86_64"}


def things(host: Host) -> set[str]:
    return {*host.plain.things()}


def gone(collected: Collection) -> set[str]:
    """The ids of artifacts and assets that went."""
    return {each.what for each in collected.gone if ":" not in each.what and not each.what.startswith("busybox")}


def names(host: Host) -> set[str]:
    return {entry["annotations"][REF_NAME] for entry in host.plain.entries()}
