"""The command `systemfiles du`: what takes the space, and why it is there."""

from __future__ import annotations

import argparse

from systemfiles.commands.common import add_json, say, say_json, say_table, system_of, warn_of_lost_leases
from systemfiles.foundation.units import human_size


def add_options(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    system = system_of(options)
    rows, total = system.usage()
    warn_of_lost_leases(system)
    if options.json:
        say_json({"uses": rows, "bytes": total})
    else:
        say_table(rows, empty="nothing is here")
        say(f"{human_size(total)} in all, what is shared counted once")
    return 0
