"""The `systemfiles` command.

`path` is run at every VM start, so this module imports nothing that a command does not need.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from systemfiles.bootfiles import VMMS, InitrdFile, KernelFile
from systemfiles.commands.common import add_json, add_names, add_place, say, say_files, say_json, system_of
from systemfiles.foundation.errors import SystemFilesError, ToolMissing, UsageError, unexpected
from systemfiles.foundation.paths import CONTENT_STORE
from systemfiles.version import __version__

_DESCRIPTION = """\
Guest kernels and initrds for microVM hosts: fetched or built once, verified, never changed, found again exactly.

  systemfiles provision --profile debian      provide the profile's kernel and initrd
  systemfiles path --profile debian           where they are, checked
  systemfiles path --kernel ch-v6.16.9        the path of one version, and only that
  systemfiles path --profile debian --cmdline qemu   the kernel command line for a VMM
"""
_EPILOG = """\
Everything is kept below --data-dir, else $SYSTEMFILES_DATA_DIR, else /var/lib/systemfiles (root) or the user's
data directory. Exit status: 0 done, 1 refused or failed (the error says why), 2 the command line is wrong.
"""
_CMDLINE = f"print the kernel command line of the pair instead, for a guest of {', '.join(VMMS[:-1])} or {VMMS[-1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. Errors go to stderr, results to stdout."""
    gc.freeze()  # what is imported stays to the end; searching it for garbage at exit would take 2 ms
    words = sys.argv[1:] if arguments is None else arguments
    options = _parser(words).parse_args(words)
    try:
        status: int = options.run(options)
    except SystemFilesError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except BrokenPipeError:
        return 1
    except OSError as error:
        sys.stderr.write(f"error: {unexpected(error)}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing half-done is left\n")
        return 130
    return status


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for `words`: with all commands, or with the one they begin with, as describing each takes 0.4 ms."""
    parser = argparse.ArgumentParser(
        prog="systemfiles", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=_Help
    )
    parser.add_argument("--version", action="version", version=f"systemfiles {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in _COMMANDS.keys() & words[:1] or _COMMANDS:
        summary, add_options, run = _COMMANDS[name]
        command = commands.add_parser(name, help=summary, formatter_class=_Help)
        command.set_defaults(run=run)
        add_place(command)
        add_options(command)
    return parser


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help as wide as the terminal. argparse makes one per option, and would import `shutil` to learn the width."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_columns() - 2)


def _columns() -> int:
    try:
        return int(os.environ.get("COLUMNS") or os.get_terminal_size().columns) or 80
    except (OSError, ValueError):
        return 80


def _provision_options(parser: argparse.ArgumentParser) -> None:
    add_names(parser)
    parser.add_argument("--all", action="store_true", help="every profile of the catalog")
    parser.add_argument("--update", action="store_true", help="first move rolling versions to what apt has now")


def _path_options(parser: argparse.ArgumentParser) -> None:
    add_names(parser)
    parser.add_argument("--cmdline", choices=VMMS, metavar="VMM", help=_CMDLINE)
    add_json(parser, "print all that is known of them as JSON")


def _list_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--catalog", action="store_true", help="list what the catalog offers instead")
    add_json(parser)


def _lock_options(parser: argparse.ArgumentParser) -> None:
    parser.usage = "systemfiles lock [-h] [--data-dir DIR] [--catalog-file FILE] -- COMMAND ..."
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="such as skopeo copy … oci:…; its options, too")


def _verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repair", action="store_true", help="make again what is damaged or missing")
    add_json(parser)


def _add_kernel_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=["kernel"], help="what it is")
    parser.add_argument("file", type=Path, help="vmlinux, bzImage, Image or Image.gz")
    parser.add_argument("--version", required=True, help="its name from now on, such as my-6.12.1")
    parser.add_argument("--arch", help="its architecture (default: this host's)")
    add_json(parser)


def _provision(options: argparse.Namespace) -> int:
    from systemfiles.graph import run

    chosen = {name: getattr(options, name) for name in ("profile", "kernel", "initrd", "arch", "data_dir")}
    variables = {name: str(value) for name, value in chosen.items() if value is not None}
    if options.all:
        variables["all"] = "yes"
    tasks = ["update"] if options.update else []
    return run(tasks, variables, catalog=options.catalog_file)


def _path(options: argparse.Namespace) -> int:
    system = system_of(options)
    if options.profile is not None:
        system.catalog.find_profile(options.profile)  # a mistyped one is an error even where it is not needed
    if options.cmdline is not None:
        files = system.resolve(options.kernel, options.initrd)
        cmdline = files.cmdline(options.cmdline)
        if options.json:
            say_json({**files.to_dict(), "cmdline": cmdline})
        else:
            say(cmdline)
    elif options.kernel is not None and options.initrd is None:
        _say_file(system.kernel(options.kernel), as_json=options.json)
    elif options.initrd is not None and options.kernel is None:
        _say_file(system.initrd(options.initrd), as_json=options.json)
    else:
        files = system.resolve(options.kernel, options.initrd)
        if options.json:
            say_json(files.to_dict())
        else:
            say_files(files)
    return 0


def _say_file(file: KernelFile | InitrdFile, *, as_json: bool) -> None:
    if as_json:
        say_json(file.to_dict())
    else:
        say(str(file.path))


def _list(options: argparse.Namespace) -> int:
    from systemfiles import listing

    system = system_of(options)
    rows = listing.offered(system.catalog) if options.catalog else listing.provided(system.artifacts())
    if options.json:
        say_json(rows)
    else:
        say(listing.table(rows))
    return 0


def _verify(options: argparse.Namespace) -> int:
    found = system_of(options).verify(repair=options.repair)
    if options.json:
        say_json({key: value if key == "artifacts" else [*map(str, value)] for key, value in found._asdict().items()})
        return 1 if found.problems else 0
    for problem in found.repaired:
        say(f"repaired: {problem.summary}")
    for problem in found.problems:
        sys.stderr.write(f"error: {problem}\n")
    if found.problems:
        if not options.repair:
            say("`systemfiles verify --repair` makes it again, from the content store or from its origin")
        return 1
    say(f"{found.artifacts} artifacts and the content store are intact")
    return 0


def _add(options: argparse.Namespace) -> int:
    # --version is the kernel's here, --arch may be absent
    kernel = system_of(options).add_kernel(options.file, options.version)
    _say_file(kernel, as_json=options.json)
    return 0


def _lock(options: argparse.Namespace) -> int:
    from systemfiles.content.layout import Layout
    from systemfiles.foundation.lock import run_locked

    system = system_of(options)
    Layout(system.paths).create()  # some tools make none where nothing is yet
    try:
        return run_locked(system.paths.lock(CONTENT_STORE), options.command)
    except FileNotFoundError:
        raise ToolMissing(options.command[0], hint="what is to run comes behind --") from None
    except OSError as error:
        msg = f"{options.command[0]} cannot be run ({error.strerror})"
        raise UsageError(msg) from error


_AddOptions = Callable[[argparse.ArgumentParser], None]
_Run = Callable[[argparse.Namespace], int]


def _module(name: str) -> tuple[_AddOptions, _Run]:
    """A command of commands/, imported by its use."""
    from importlib import import_module

    def add_options(parser: argparse.ArgumentParser) -> None:
        import_module(f"systemfiles.commands.{name}").add_options(parser)

    def run(options: argparse.Namespace) -> int:
        status: int = import_module(f"systemfiles.commands.{name}").run(options)
        return status

    return add_options, run


_COMMANDS: dict[str, tuple[str, _AddOptions, _Run]] = {
    "provision": ("fetch or build what is missing, and print the paths", _provision_options, _provision),
    "path": ("print where a kernel and an initrd are; builds nothing, needs no network", _path_options, _path),
    "ls": ("list what is on disk", _list_options, _list),
    "verify": ("read every byte on disk and compare it with its record", _verify_options, _verify),
    "lease": ("hold a kernel and an initrd for a running VM", *_module("lease")),
    "pin": ("hold a kernel and an initrd for a snapshot", *_module("pin")),
    "unpin": ("end a pin", *_module("unpin")),
    "pins": ("list the pins", *_module("pins")),
    "restore": ("print where a pin's files are, and bring back what is gone", *_module("restore")),
    "gc": ("remove what nothing holds", *_module("gc")),
    "du": ("say what takes the space, and why it is there", *_module("du")),
    "disk": ("make a guest's root, overlay or config disk", *_module("disk")),
    "fetch": ("take versions from a registry, and build nothing", *_module("fetch")),
    "publish": ("push a release to a registry, and sign it", *_module("publish")),
    "boot": ("boot the pair in QEMU and check what it promises a guest", *_module("boot")),
    "lock": ("run another tool that writes to the content store, while nobody else does", _lock_options, _lock),
    "add": ("take a local kernel in as a version of its own", _add_kernel_options, _add),
}

if __name__ == "__main__":
    sys.exit(main())
