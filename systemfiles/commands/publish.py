"""The command `systemfiles publish`: pushes a release to an OCI registry, and signs it."""

from __future__ import annotations

import argparse
from pathlib import Path

from systemfiles.commands.common import add_json, say, say_json
from systemfiles.foundation.progress import ProgressBars


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("registry", metavar="REGISTRY", help="where to, such as registry.example.com/systemfiles")
    parser.add_argument("--dist", type=Path, default=Path("dist"), metavar="DIR", help="the release (default: dist)")
    parser.add_argument(
        "--key", type=Path, action="append", default=[], metavar="FILE", help="a private key to sign with; repeatable"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from systemfiles.release.dist import read_dist
    from systemfiles.release.publishing import publish, read_keys

    bars = ProgressBars()
    keys = read_keys(options.key)
    artifacts = read_dist(options.dist)
    try:
        for published in publish(artifacts, options.registry, keys, progress=bars):
            with bars.aside():
                if options.json:
                    say_json({**published._asdict(), "arches": [*map(str, published.arches)]})
                else:
                    done = f"{published.pushed} pushed" if published.pushed else "was there"
                    signed = f"signed by {', '.join(published.signed)}" if published.signed else "not signed: no --key"
                    say(f"{published.reference}\n  {', '.join(map(str, published.arches))}: {done}, {signed}")
    finally:
        bars.close()
    return 0
