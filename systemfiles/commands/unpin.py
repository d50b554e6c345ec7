"""The command `systemfiles unpin`."""

from __future__ import annotations

import argparse

from systemfiles.commands.common import say, system_of


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the pin to end")


def run(options: argparse.Namespace) -> int:
    system_of(options).unpin(options.name)
    say(f"{options.name} holds nothing any more")
    return 0
