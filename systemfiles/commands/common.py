"""What commands share: options that several have, and how they say their results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from systemfiles.foundation.errors import LeasesLost
from systemfiles.system import SystemFiles

if TYPE_CHECKING:
    from systemfiles.bootfiles import BootFiles
    from systemfiles.retention.pins import Pin


def add_place(parser: argparse.ArgumentParser, *, again: bool = False) -> None:
    """`again`: for an action of a command that has them, too, and behind which they may be given as well."""
    default = argparse.SUPPRESS if again else None  # else it would take the place of what was given before
    parser.add_argument("--data-dir", type=Path, metavar="DIR", default=default, help="where everything is kept")
    parser.add_argument(
        "--catalog-file", type=Path, metavar="FILE", default=default, help="a catalog laid over the shipped one"
    )


def add_names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", help="a named pair of defaults (systemfiles ls --catalog)")
    parser.add_argument("--kernel", metavar="VERSION", help="a kernel version")
    parser.add_argument("--initrd", metavar="VERSION", help="an initrd version")
    parser.add_argument("--arch", help="x86_64 or aarch64 (default: this host's)")


def add_json(parser: argparse.ArgumentParser, help_text: str = "print JSON") -> None:
    parser.add_argument("--json", action="store_true", help=help_text)


def system_of(options: argparse.Namespace, *, build: bool | None = None) -> SystemFiles:
    return SystemFiles(
        options.data_dir,
        catalog=options.catalog_file,
        profile=getattr(options, "profile", None),
        arch=getattr(options, "arch", None),
        build=build,
    )


def say_files(files: BootFiles) -> None:
    """Two lines, for a kernel and an initrd."""
    say(f"kernel  {files.kernel.path}\ninitrd  {files.initrd.path}")


def say_table(rows: Sequence[Mapping[str, str | int]], *, empty: str) -> None:
    """A table, or `empty` where there is nothing to list."""
    from systemfiles.listing import table

    say(table(rows, empty=empty))


def pin_facts(pin: Pin) -> dict[str, Any]:
    """A pin for JSON, without the records of how its files were made."""
    facts = pin.to_json()
    for kind in ("kernel", "initrd"):
        facts[kind] = {key: value for key, value in facts[kind].items() if key != "record"}
    return facts


def warn_of_lost_leases(system: SystemFiles) -> None:
    """Says on stderr when leases were lost, so that an empty list of them is not taken for the truth."""
    try:
        system.holdings.require_leases()
    except LeasesLost as error:
        sys.stderr.write(f"warning: {error}\n")


def say(text: str) -> None:
    """A line on stdout; what that has no way to write comes as an escape."""
    try:
        sys.stdout.write(f"{text}\n")
    except UnicodeEncodeError:
        encoding = sys.stdout.encoding
        sys.stdout.write(f"{text.encode(encoding, 'backslashreplace').decode(encoding)}\n")


def say_json(value: object) -> None:
    import json

    say(json.dumps(value, indent=1))
