"""The command `systemfiles pin`: holds what a snapshot needs until it is unpinned, whatever becomes of the registry."""

from __future__ import annotations

import argparse

from systemfiles.commands.common import add_json, add_names, pin_facts, say, say_json, system_of
from systemfiles.foundation.errors import UsageError


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="what to call it, such as a snapshot's name")
    add_names(parser)
    parser.add_argument("--hypervisor", metavar="VERSION", help="the hypervisor's version, which `restore` compares")
    parser.add_argument("--label", action="append", default=[], metavar="KEY=VALUE", help="kept with it; repeatable")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    system = system_of(options)
    files = system.resolve(options.kernel, options.initrd)
    labels = dict(_label(text) for text in options.label)
    pin = system.pin(options.name, files, hypervisor=options.hypervisor, labels=labels)
    if options.json:
        say_json(pin_facts(pin))
    else:
        say(f"{pin.name} holds kernel {pin.kernel.version} and initrd {pin.initrd.version} ({pin.kernel.arch})")
    return 0


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        msg = f"--label {text!r:.100} is no KEY=VALUE"
        raise UsageError(msg)
    return key, value
