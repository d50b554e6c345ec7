"""The command `systemfiles boot`."""

from __future__ import annotations

import argparse

from systemfiles.commands.common import add_json, add_names, say, say_json, system_of


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "image", nargs="?", metavar="IMAGE", help="an image of the content store (default: one that only looks around)"
    )
    add_names(parser)
    parser.add_argument("--accel", default="tcg", help="tcg emulates either architecture; kvm needs /dev/kvm")
    parser.add_argument(
        "--limit",
        type=float,
        default=60,
        metavar="SECONDS",
        help="how long the entrypoint may run before it is asked to end (default: 60)",
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from systemfiles.foundation.interruption import Interruption
    from systemfiles.foundation.progress import ProgressBars
    from systemfiles.recipes.bootcheck import check_and_keep_log

    system = system_of(options)
    bars = ProgressBars()
    interruption = Interruption()
    interruption.expect()
    progress = interruption.watched(bars)
    try:
        with interruption.stopping():
            files = system.resolve(options.kernel, options.initrd)
            image = None if options.image is None else system.image(options.image, progress=progress)
            report = check_and_keep_log(
                files,
                system.paths,
                image=image,
                accel=options.accel,
                limit=options.limit,
                progress=progress,
            )
    finally:
        bars.close()
    if options.json:
        say_json(report.to_dict())
    else:
        say(report.text())
    return 0 if report.holds else 1
