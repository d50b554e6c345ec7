"""The command `systemfiles restore`: the files that a pin names, brought back where they are gone."""

from __future__ import annotations

import argparse

from systemfiles.commands.common import add_json, say_files, say_json, system_of


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the pin")
    parser.add_argument("--hypervisor", metavar="VERSION", help="refuse another hypervisor than the pin was made with")
    parser.add_argument("--full", action="store_true", help="read every byte, whatever the files look like")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    files = system_of(options).restore(options.name, hypervisor=options.hypervisor, full=options.full)
    if options.json:
        say_json(files.to_dict())
    else:
        say_files(files)
    return 0
