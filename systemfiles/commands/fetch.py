"""The command `systemfiles fetch`: provides versions as they were published; nothing is built."""

from __future__ import annotations

import argparse

from systemfiles.commands.common import add_json, add_names, say_files, say_json, system_of
from systemfiles.foundation.progress import ProgressBars


def add_options(parser: argparse.ArgumentParser) -> None:
    add_names(parser)
    add_json(parser, "print everything known of them as JSON")


def run(options: argparse.Namespace) -> int:
    bars = ProgressBars()
    try:
        files = system_of(options, build=False).ensure(options.kernel, options.initrd, progress=bars)
    finally:
        bars.close()
    if options.json:
        say_json(files.to_dict())
    else:
        say_files(files)
    return 0
