"""The command `systemfiles pins`: those that can be read, and what is wrong with the others."""

from __future__ import annotations

import argparse
import sys

from systemfiles.commands.common import add_json, pin_facts, say_json, say_table, system_of
from systemfiles.foundation.errors import SystemFilesError


def add_options(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    found = [*system_of(options).holdings.pins.each()]
    pins = [each for each in found if not isinstance(each, SystemFilesError)]
    damaged = [each for each in found if isinstance(each, SystemFilesError)]
    for error in damaged:
        sys.stderr.write(f"error: {error}\n")
    if options.json:
        say_json([pin_facts(pin) for pin in pins])
        return 1 if damaged else 0
    rows = [
        {
            "pin": pin.name,
            "arch": pin.kernel.arch.value,
            "kernel": pin.kernel.version,
            "initrd": pin.initrd.version,
            "hypervisor": pin.hypervisor or "-",
            "since": pin.created_at,
        }
        for pin in pins
    ]
    if rows or not damaged:
        say_table(rows, empty="nothing is pinned")
    return 1 if damaged else 0
