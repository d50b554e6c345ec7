"""The command `systemfiles lease`: what running VMs hold, so that no collection takes it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from systemfiles.commands.common import (
    add_json,
    add_names,
    add_place,
    say,
    say_files,
    say_json,
    say_table,
    system_of,
    warn_of_lost_leases,
)
from systemfiles.foundation.units import utc

if TYPE_CHECKING:
    from systemfiles.registry.leases import Lease


def add_options(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="what to do", metavar="ACTION", required=True)

    acquire = actions.add_parser("acquire", help="hold a kernel and an initrd, and print the lease and their paths")
    acquire.add_argument("--holder", required=True, help="who holds them, such as a VM's name")
    acquire.add_argument("--ttl", type=int, metavar="SECONDS", help="when it ends by itself (default: never)")
    add_names(acquire)
    acquire.set_defaults(act=_acquire)

    renew = actions.add_parser("renew", help="let a lease end later")
    renew.add_argument("lease", metavar="LEASE", help="its id")
    renew.add_argument("--ttl", type=int, metavar="SECONDS", required=True, help="when it ends by itself, from now")
    renew.set_defaults(act=_renew)

    release = actions.add_parser("release", help="end a lease, or all of a holder")
    which = release.add_mutually_exclusive_group(required=True)
    which.add_argument("lease", metavar="LEASE", nargs="?", help="its id")
    which.add_argument("--holder", help="whose leases all end")
    release.set_defaults(act=_release)

    listing = actions.add_parser("list", help="list the live leases")
    listing.add_argument("--holder", help="only those of this holder")
    listing.set_defaults(act=_list)
    for action in (acquire, renew, listing):
        add_json(action)
    for action in (acquire, renew, release, listing):
        add_place(action, again=True)


def run(options: argparse.Namespace) -> int:
    options.act(options)
    return 0


def _acquire(options: argparse.Namespace) -> None:
    system = system_of(options)
    files = system.resolve(options.kernel, options.initrd)
    lease = system.acquire(files, holder=options.holder, ttl=options.ttl)
    if options.json:
        say_json({"lease": lease.id, "expires_at": lease.expires_at, **files.to_dict()})
    else:
        say(f"lease   {lease.id}")
        say_files(files)


def _renew(options: argparse.Namespace) -> None:
    lease = system_of(options).renew(options.lease, options.ttl)
    if options.json:
        say_json(_facts(lease))
    else:
        say(f"lease {lease.id} ends {_end(lease)}")


def _release(options: argparse.Namespace) -> None:
    system = system_of(options)
    if options.lease is not None:
        system.release(options.lease)
        say(f"lease {options.lease} is released")
    else:
        count = system.release_all(options.holder)
        warn_of_lost_leases(system)
        say(f"{count} lease{'s' * (count != 1)} of {options.holder} released")


def _list(options: argparse.Namespace) -> None:
    system = system_of(options)
    leases = system.leases(options.holder)
    warn_of_lost_leases(system)
    if options.json:
        say_json([_facts(lease) for lease in leases])
        return
    rows = [
        {"lease": lease.id, "holder": lease.holder, "ends": _end(lease), "holds": ", ".join(lease.asset_ids)}
        for lease in leases
    ]
    say_table(rows, empty="there are no live leases")


def _facts(lease: Lease) -> dict[str, Any]:
    return {
        "lease": lease.id,
        "holder": lease.holder,
        "acquired_at": lease.acquired_at,
        "expires_at": lease.expires_at,
        "assets": list(lease.asset_ids),
    }


def _end(lease: Lease) -> str:
    return "never" if lease.expires_at is None else utc(lease.expires_at)
