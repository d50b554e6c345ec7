"""The command `systemfiles pins`."""

from __future__ import annotations

import argparse

from systemfiles.commands.common import add_json, pin_facts, say_json, say_table, system_of


def add_options(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    pins = system_of(options).pins()
    if options.json:
        say_json([pin_facts(pin) for pin in pins])
        return 0
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
    say_table(rows, empty="nothing is pinned")
    return 0
