"""A power cut loses nothing that has a name: data is durable before its name is, and the name before the next one.

strace(1) tells which calls were made in which order, and of which file every descriptor was (`-y`).
"""

from __future__ import annotations

import json
import posixpath
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from systemfiles.foundation.paths import Paths
from systemfiles.retention.outcome import Gone, tell
from tests.conftest import CHECKOUT
from tests.crash.conftest import Campaign
from tests.crash.ledger import DATABASE
from tests.crash.scenarios import SCENARIOS
from tests.crash.world import ARCH, World, copy_data_dir

_WRITING = ("write", "writev", "pwrite64", "ftruncate", "sendfile", "copy_file_range")
_SYNCING = ("fsync", "fdatasync")
_NAMING = ("rename", "renameat", "renameat2", "link", "linkat")
_REMOVING = ("unlink", "unlinkat")
_TRACED = ",".join(["open,openat,creat", *_WRITING, *_SYNCING, *_NAMING, *_REMOVING])
_LINE = re.compile(r"(?P<at>\d+\.\d+) (?P<name>\w+)\((?P<args>.*)\) += (?P<value>-?\d+)(?:<(?P<path>[^>]*)>)?")
_DESCRIPTOR = re.compile(r"\d+<([^>]*)>")
_PATH = re.compile(r'(?:(?:\d+|AT_FDCWD)<(?P<at>[^>]*)>, )?"(?P<path>(?:[^"\\]|\\.)*)"')
_WHOLE = 8192  # bytes of what is written that are told: more than a page of SQLite
_PROMISES = [
    *("registry", "lease-anew", "lease", "ensure-held", "pin", "pin-again", "unpin", "migrate"),
    *("collect", "collect-lost"),
]
"""Scenarios that say on stdout what they were promised."""
_RUN = """
import sys
from pathlib import Path
from tests.crash.running import Run
from tests.crash.scenarios import SCENARIOS
from tests.crash.world import World
root, host, image, name, data = sys.argv[1:]
sys.exit(SCENARIOS[name].run(Run(World(Path(root), host, image), Path(data), "traced")))
"""


class Step(NamedTuple):
    """A call that succeeded: its thread, its name, and the paths of its descriptors and arguments."""

    thread: str
    name: str
    args: str
    paths: tuple[str, ...]


def _steps(logs: Iterator[Path]) -> list[Step]:
    """All threads' calls in the order they were made."""
    steps = []
    for log in logs:
        for line in log.read_text(errors="replace").splitlines():
            found = _LINE.match(line)
            if found and int(found["value"]) >= 0:
                name, args = found["name"], found["args"]
                steps.append((float(found["at"]), Step(log.suffix, name, args, _paths(name, args, found["path"]))))
    return [step for _, step in sorted(steps, key=lambda pair: pair[0])]


def _paths(name: str, args: str, opened: str | None) -> tuple[str, ...]:
    if opened:
        return (opened,)
    if name in _WRITING + _SYNCING:
        found = _DESCRIPTOR.findall(args.partition('"')[0])  # behind it is what was written
        return tuple(found[:1] if name == "sendfile" else found[-1:])
    named = [posixpath.join(part["at"] or "/", part["path"]) for part in _PATH.finditer(args)]
    return tuple(map(posixpath.normpath, named))


@cache
def _traced(world: World, name: str) -> tuple[list[Step], Path, frozenset[str]]:
    """What a scenario does, on which data directory, and the files that were there before."""
    disk = world.root / "traced" / name
    disk.parent.mkdir(exist_ok=True)
    copy_data_dir(world.base(SCENARIOS[name].base), disk)
    before = frozenset(map(str, disk.rglob("*")))
    (logs := world.root / "traced" / f"{name}-logs").mkdir()
    command = ["strace", "-ff", "-ttt", "-y", "-qq", "-s", str(_WHOLE), "-e", f"trace={_TRACED}", "-o", f"{logs}/of"]
    words = [world.root, world.host, world.image, name, disk / "data"]
    done = subprocess.run(
        [*command, sys.executable, "-c", _RUN, *map(str, words)],
        cwd=CHECKOUT,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return _steps(logs.iterdir()), disk / "data", before


def _too_early(steps: list[Step], kept: str) -> Iterator[str]:
    """Names below the directory `kept` that were given before the data, or the name before them, was durable."""
    inodes: dict[str, object] = {}
    volatile: set[object] = set()
    pending: dict[str, str] = {}
    for thread, name, args, paths in steps:
        if name in ("open", "openat", "creat") and ("O_CREAT" in args or name == "creat"):
            inodes.setdefault(paths[0], object())
            if paths[0].startswith(f"{kept}/"):
                yield f"{paths[0]} is made in place"
        elif name in _WRITING:
            volatile |= {inodes[path] for path in paths if path in inodes}
        elif name in _SYNCING:
            volatile -= {inodes.get(paths[0])}
            if pending.get(thread) == paths[0]:
                del pending[thread]
        elif name in _NAMING:
            source, target = paths[-2:]
            inode = inodes.pop(source, None) if name.startswith("rename") else inodes.get(source)
            if inode is not None:
                inodes[target] = inode
            if not target.startswith(f"{kept}/"):
                continue
            if inode in volatile:
                yield f"{target} has a name before its data is durable"
            if thread in pending:
                yield f"{target} has a name before what was named in {pending[thread]} has it durably"
            pending[thread] = posixpath.dirname(target)
    for directory in pending.values():
        yield f"the last name in {directory} is never made durable"


def _not_durable(steps: list[Step], data: str, before: frozenset[str]) -> Iterator[str]:
    """What a power cut would take back although a call that had returned had promised it: at each line on stdout."""
    volatile: dict[str, str] = {}
    there, unwritten = {*before}, set[str]()
    for _, name, args, paths in steps:
        if name == "write" and '"promised ' in args:
            told = args.partition('"')[2][:40]
            yield from (f"{told}: {what}" for what in volatile.values())
        elif name in _WRITING:
            for path in (path for path in paths if _lasts(path, data)):
                volatile[path] = f"what {path} holds"
                if path in unwritten:
                    volatile[f"{posixpath.dirname(path)}/."] = f"that {path} is there"
        elif name in _SYNCING:
            volatile = {path: what for path, what in volatile.items() if path not in (paths[0], f"{paths[0]}/.")}
            unwritten = {path for path in unwritten if posixpath.dirname(path) != paths[0]}
        elif name in _NAMING + _REMOVING:
            there |= {paths[-1]}
            for path in paths[-1:] if name.startswith("link") else paths:
                if _lasts(path, data) and path != f"{data}/{DATABASE}-wal":  # an empty log, or none, is the same
                    volatile[f"{posixpath.dirname(path)}/."] = f"{name} of {path}"
        elif paths[0] not in there:
            there |= {paths[0]}
            unwritten |= {paths[0]}


def _lasts(path: str, data: str) -> bool:
    """Whether a path counts: what is temporary does not, nor what SQLite writes again from its log."""
    first = path.removeprefix(f"{data}/").partition("/")[0]
    passing = ("tmp", "locks", DATABASE, f"{DATABASE}-shm", f"{DATABASE}-journal")
    return path.startswith(f"{data}/") and first not in passing


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name not in ("push", "verify", "pin-again")])
def test_whatever_has_a_name_is_durable_and_was_made_so_in_order(campaigning: Campaign, name: str) -> None:
    steps, data, _ = _traced(campaigning.world, name)
    assert [*_too_early(steps, str(data / "system"))] == []
    made = Counter(step.name for step in steps)
    assert made["fsync"] + made["fdatasync"] > 0


@pytest.mark.parametrize("name", _PROMISES)
def test_what_a_call_has_promised_when_it_returns_is_durable(campaigning: Campaign, name: str) -> None:
    steps, data, before = _traced(campaigning.world, name)
    assert any('"promised ' in step.args for step in steps)
    assert [*_not_durable(steps, str(data), before)] == []


@pytest.mark.parametrize(
    ("asset", "version", "path"),
    [
        (f"kernel-k-gone-{ARCH}", "k-gone", f"system/kernel/k-gone/{ARCH}"),
        (f"initrd-i-gone-{ARCH}", "i-gone", f"system/initrd/i-gone/{ARCH}"),
        ("disk-gone", "disk-gone", "disks/disk-gone.img"),
    ],
)
def test_a_tombstone_is_durable_before_anything_goes_and_goes_last(
    campaigning: Campaign, asset: str, version: str, path: str
) -> None:
    steps, data, _ = _traced(campaigning.world, "collect")
    log, index, told = f"{data}/{DATABASE}-wal", f"{data}/system/oci-cache/index.json", f"{data}/collected.jsonl"
    # a row of the table, in which these columns follow another
    condemned = _find(steps, 0, ("pwrite64",), log, f"{asset}{version}{path}")
    durable = _find(steps, condemned, _SYNCING, log)
    removed = _find(steps, durable, _NAMING + _REMOVING, f"{data}/{path}")
    assert _found(steps, 0, _NAMING + _REMOVING, f"{data}/{path}") == [removed]
    settled = _find(steps, removed, _SYNCING, posixpath.dirname(f"{data}/{path}"))
    written = _find(steps, settled, ("write",), told, asset)
    kept = _find(steps, written, _SYNCING, told)
    dropped = _find(steps, durable + 1, ("pwrite64",), log)
    assert kept < dropped
    if path.startswith("system/"):
        unnamed = [at for at in _found(steps, durable, _NAMING, index) if at < removed]
        assert unnamed
        assert _find(steps, unnamed[-1], _SYNCING, posixpath.dirname(index)) < removed


def test_no_blob_goes_before_it_is_durable_that_nothing_refers_to_it(campaigning: Campaign) -> None:
    steps, data, _ = _traced(campaigning.world, "collect")
    layout = f"{data}/system/oci-cache"
    removed = [at for at, step in enumerate(steps) if step.name in _REMOVING and f"{layout}/blobs/" in step.paths[-1]]
    assert removed
    for renamed in _found(steps, 0, _NAMING, f"{layout}/index.json"):
        assert not [at for at in removed if renamed < at < _find(steps, renamed, _SYNCING, layout)]


def _found(steps: list[Step], start: int, names: tuple[str, ...], path: str, text: str = "") -> list[int]:
    """Where one of these calls is about `path`, and has `text` among its arguments."""
    places = enumerate(steps[start:], start)
    return [at for at, step in places if step.name in names and path in step.paths and text in step.args]


def _find(steps: list[Step], start: int, names: tuple[str, ...], path: str, text: str = "") -> int:
    found = _found(steps, start, names, path, text)
    assert found, f"no {' or '.join(names)} of {path} with {text!r}"
    return found[0]


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ("create write rename fsync-dir", "before its data is durable"),
        ("create write fsync rename", "never made durable"),
        ("create write fsync rename rename-other fsync-dir", "before what was named"),
        ("create-in-place", "made in place"),
        ("create write fsync write rename fsync-dir", "before its data is durable"),
    ],
)
def test_an_order_that_a_power_cut_would_break_is_seen(steps: str, told: str) -> None:
    known = {
        "create": Step("1", "openat", "O_CREAT", ("/tmp/new",)),
        "create-in-place": Step("1", "openat", "O_CREAT", ("/kept/file",)),
        "write": Step("1", "write", "", ("/tmp/new",)),
        "fsync": Step("1", "fsync", "", ("/tmp/new",)),
        "rename": Step("1", "rename", "", ("/tmp/new", "/kept/file")),
        "rename-other": Step("1", "rename", "", ("/tmp/other", "/kept/other")),
        "fsync-dir": Step("1", "fsync", "", ("/kept",)),
    }
    assert any(told in problem for problem in _too_early([known[step] for step in steps.split()], "/kept"))


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ("write-log promise", "what /kept/registry.sqlite-wal holds"),
        ("write-log fsync-log write-log promise", "what /kept/registry.sqlite-wal holds"),
        ("rename promise fsync-dir", "rename of /kept/file"),
        ("unlink promise", "unlink of /kept/file"),
        ("create write fsync promise", "that /kept/new is there"),
        ("write-log fsync-log create fsync-dir write fsync rename fsync-dir unlink fsync-dir promise", ""),
    ],
)
def test_a_promise_that_a_power_cut_would_break_is_seen(steps: str, told: str) -> None:
    known = {
        "write-log": Step("1", "pwrite64", "", ("/kept/registry.sqlite-wal",)),
        "fsync-log": Step("1", "fdatasync", "", ("/kept/registry.sqlite-wal",)),
        "create": Step("1", "openat", "O_CREAT", ("/kept/new",)),
        "write": Step("1", "write", "", ("/kept/new",)),
        "fsync": Step("1", "fsync", "", ("/kept/new",)),
        "rename": Step("1", "rename", "", ("/kept/tmp/new", "/kept/file")),
        "unlink": Step("1", "unlink", "", ("/kept/file",)),
        "fsync-dir": Step("1", "fsync", "", ("/kept",)),
        "promise": Step("1", "write", '1<pipe:[1]>, "promised pin one\\n", 17', ("pipe:[1]",)),
    }
    problems = [*_not_durable([known[step] for step in steps.split()], "/kept", frozenset())]
    assert [problem.partition(": ")[2] for problem in problems] == ([told] if told else [])


def test_half_a_line_of_the_audit_log_goes_when_the_next_is_written(tmp_path: Path) -> None:
    paths = Paths(tmp_path)
    tell(paths, [Gone("one", "held by nothing", "", 1), Gone("two", "held by nothing", "vm-1", 2)], now=0)
    with paths.collected.open("ab") as out:
        out.write(b'{"at": "2026-11-20T0')
    tell(paths, [Gone("three", "held by nothing", "", 3)], now=0)
    assert [json.loads(line)["what"] for line in paths.collected.read_text().splitlines()] == ["one", "two", "three"]
