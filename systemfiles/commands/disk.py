"""The command `systemfiles disk`: one of a guest's three disks, from an image in the content store or in a registry."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from systemfiles.commands.common import add_place, say, system_of
from systemfiles.foundation.errors import UsageError

if TYPE_CHECKING:
    from systemfiles.content.images import Image
    from systemfiles.foundation.progress import Progress
    from systemfiles.recipes.guestconfig import GuestConfig, Network, Volume

_IMAGE = "a name or digest in the content store, or a full reference, which is pulled: docker.io/library/nginx:1.29"
_WORDS = """\
The words behind -- take the place of the image's Cmd; without --image they are the whole command line. Everything that
the image says can be replaced, and the variables of --env are added to the image's.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(title="disks", metavar="DISK", required=True, parser_class=_Parser)
    shared: dict[str, Any] = {"formatter_class": parser.formatter_class}

    rootfs = kinds.add_parser("rootfs", help="an image's root file system; replaces FILE", **shared)
    rootfs.add_argument("image", metavar="IMAGE", help=_IMAGE)
    rootfs.add_argument("--format", choices=["ext4", "erofs"], default="ext4", help="its file system (default: ext4)")
    rootfs.add_argument("--size", help="such as 2G (default: as small as can be)")
    rootfs.add_argument("--arch", help="x86_64 or aarch64 (default: this host's)")

    overlay = kinds.add_parser("overlay", help="what a guest will write; never replaces FILE", **shared)
    overlay.add_argument("--size", required=True, help="such as 512M or 10G; it takes space as the guest writes")

    config = kinds.add_parser("config", help="what a guest should run, and how; replaces FILE", epilog=_WORDS, **shared)
    config.usage = "systemfiles disk config [-h] [--image IMAGE] [OPTION ...] FILE [-- WORD ...]"
    config.takes_words = True
    _add_config_options(config)

    for kind, make in ((rootfs, _rootfs), (overlay, _overlay), (config, _config)):
        add_place(kind, again=True)
        kind.add_argument("file", type=Path, metavar="FILE", help="where the disk should be")
        kind.set_defaults(make=make)


def run(options: argparse.Namespace) -> int:
    from systemfiles.foundation.progress import ProgressBars
    from systemfiles.foundation.units import human_size

    if not options.file.parent.is_dir():
        msg = f"{options.file.parent} is not a directory"
        raise UsageError(msg, hint="make it first, if that is where the disk should be")
    bars = ProgressBars()
    try:
        options.make(options, bars)
    finally:
        bars.close()
    told = str(options.file).encode(errors="surrogateescape").decode(errors="replace")
    say(f"{told}  {human_size(options.file.stat().st_size)}")
    return 0


class _Parser(argparse.ArgumentParser):
    """A parser that may take words behind "--", wherever its options stand: argparse alone would lose those."""

    takes_words = False

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        own, words = list(args or ()), None
        if self.takes_words and "--" in own:
            end = own.index("--")
            own, words = own[:end], own[end + 1 :]
        found, unknown = super().parse_known_args(own, namespace)
        found.words = words
        return found, unknown


def _add_config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", metavar="IMAGE", help=_IMAGE)
    parser.add_argument("--arch", help="which of the image's platforms (default: this host's)")
    parser.add_argument(
        "--entrypoint",
        metavar="WORD",
        help="a word or a JSON list of words in place of the image's, whose Cmd goes too",
    )
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable; any number")
    parser.add_argument("--workdir", metavar="PATH", help="where the command starts")
    parser.add_argument("--user", metavar="USER[:GROUP]", help="names that the image knows, or numbers")
    parser.add_argument("--stop-signal", metavar="SIGNAL", help="what the command gets for TERM, such as QUIT")
    parser.add_argument("--hostname", metavar="NAME", help="what the guest is called")
    parser.add_argument("--address", metavar="ADDRESS/PREFIX", help="of eth0, such as 10.0.2.15/24")
    parser.add_argument("--gateway", metavar="ADDRESS", help="where the default route leads")
    parser.add_argument("--dns", action="append", default=[], metavar="ADDRESS", help="a name server; any number")
    parser.add_argument(
        "--volume",
        action="append",
        default=[],
        metavar="DEVICE:PATH[:MODE[:OVERLAY]]",
        help="a disk to mount, by name or serial; MODE is rw, ro or overlay, which needs a device for changes",
    )
    parser.add_argument("--init-mode", choices=["systemd"], help="let the image's own init be PID 1")


def _rootfs(options: argparse.Namespace, progress: Progress) -> None:
    from systemfiles.foundation.units import parse_size
    from systemfiles.recipes.disks import write_rootfs_disk

    size = None if options.size is None else parse_size(options.size)
    image = _image(options, progress)
    write_rootfs_disk(options.file, image.layers, format=options.format, size=size, progress=progress)


def _overlay(options: argparse.Namespace, progress: Progress) -> None:
    from systemfiles.foundation.units import parse_size
    from systemfiles.recipes.disks import write_overlay_disk

    write_overlay_disk(options.file, parse_size(options.size))


def _config(options: argparse.Namespace, progress: Progress) -> None:
    from systemfiles.recipes.disks import write_config_disk

    write_config_disk(options.file, _guest(options, progress))


def _guest(options: argparse.Namespace, progress: Progress) -> GuestConfig:
    """What the options say, over what the image says."""
    from dataclasses import replace

    from systemfiles.recipes.guestconfig import GuestConfig

    # before anything is fetched
    said: dict[str, Any] = {"network": _network(options), "volumes": [_volume(text) for text in options.volume]}
    variables = dict(_variable(text) for text in options.env)
    entrypoint = None if options.entrypoint is None else _entrypoint(options.entrypoint)
    config = GuestConfig()
    if options.image is not None:
        config = GuestConfig.from_image(_image(options, progress).config, subject=options.image)
    if entrypoint is not None:
        said |= {"entrypoint": entrypoint, "cmd": ()}  # arguments for another program
    if options.words is not None:
        said["cmd"] = options.words
    for name in ("workdir", "user", "hostname", "stop_signal", "init_mode"):
        if (value := getattr(options, name)) is not None:
            said[name] = value
    return replace(config, environment={**config.environment, **variables}, **said)


def _image(options: argparse.Namespace, progress: Progress) -> Image:
    return system_of(options).image(options.image, progress=progress)


def _entrypoint(text: str) -> list[str]:
    if not (text.startswith("[") and text.endswith("]")):
        return [text] if text else []
    import json

    try:
        words = json.loads(text)
    except (ValueError, RecursionError):
        words = None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        msg = f"--entrypoint {text[:100]!r} is no JSON list of words"
        raise UsageError(msg, hint="""such as '["/bin/sh", "-c"]', or a single word as it is""")
    return words


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        msg = f"--env {text[:100]!r} is not NAME=VALUE"
        raise UsageError(msg)
    return name, value


def _network(options: argparse.Namespace) -> Network | None:
    from systemfiles.recipes.guestconfig import Network

    if options.address is not None:
        return Network(options.address, options.gateway, options.dns)
    if options.gateway is not None or options.dns:
        msg = "--gateway and --dns go with --address"
        raise UsageError(msg)
    return None


def _volume(text: str) -> Volume:
    from systemfiles.recipes.guestconfig import Volume

    parts: list[Any] = text.split(":")
    if not 2 <= len(parts) <= 4:
        msg = f"--volume {text[:100]!r} is not DEVICE:PATH[:MODE[:OVERLAY]]"
        raise UsageError(msg, hint="such as vdd:/data, vdd:/data:ro or vdd:/data:overlay:vde")
    return Volume(*parts)
