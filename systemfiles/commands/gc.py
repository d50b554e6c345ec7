"""The command `systemfiles gc`: removes what nothing holds, or says what that would be, or why something is kept."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from systemfiles.commands.common import add_json, say, say_json, system_of, warn_of_lost_leases
from systemfiles.foundation.errors import UsageError
from systemfiles.foundation.units import parse_duration, parse_size

if TYPE_CHECKING:
    from systemfiles.system import SystemFiles

_EPILOG = """\
Kept are: what is leased or pinned, the current versions of profiles, what other tools named in the content store, what
is being worked on, and what the limits leave ([retention] in the catalog, or the options here).
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("--dry-run", action="store_true", help="say what would go; changes nothing at all")
    parser.add_argument("--explain", metavar="WHAT", help="why a version, digest, pin or name is kept, or would go")
    parser.add_argument("--grace", metavar="TIME", help="keep what was used within it, such as 90s, 24h, 7d")
    parser.add_argument("--keep-last", type=int, metavar="N", help="keep the N newest kernels and initrds")
    parser.add_argument("--max-cache-bytes", metavar="SIZE", help="how large the content store may be, such as 10G")
    parser.add_argument("--accept-lost-leases", action="store_true", help="collect although the registry was lost")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    system = system_of(options)
    grace = None if options.grace is None else parse_duration(options.grace)
    if options.explain is not None:
        return _explain(system, options, grace)
    found = system.collect(
        dry_run=options.dry_run,
        grace=grace,
        keep_last=options.keep_last,
        max_cache_bytes=None if options.max_cache_bytes is None else parse_size(options.max_cache_bytes),
        accept_lost_leases=options.accept_lost_leases,
    )
    for problem in found.problems:
        sys.stderr.write(f"error: {problem}\n")
    if options.json:
        gone = [each._asdict() for each in found.gone]
        problems = [*map(str, found.problems)]
        say_json({"gone": gone, "count": found.count, "bytes_freed": found.bytes_freed, "problems": problems})
    else:
        say(found.told(dry_run=options.dry_run))
    return 1 if found.problems else 0


def _explain(system: SystemFiles, options: argparse.Namespace, grace: int | None) -> int:
    for name in ("dry_run", "max_cache_bytes", "accept_lost_leases"):
        if getattr(options, name) not in (None, False):
            msg = f"--{name.replace('_', '-')} means nothing to --explain"
            raise UsageError(msg, hint="--grace and --keep-last do")
    found = system.explain(options.explain, grace=grace, keep_last=options.keep_last)
    warn_of_lost_leases(system)
    if options.json:
        say_json([each._asdict() for each in found])
    else:
        for each in found:
            say(f"{each.what}\n  {'kept' if each.kept else 'would go'}: {each.why}")
    return 0
