"""A power cut loses nothing that has a name: data is durable before its name is, and the name before the next one.

strace(1) tells which calls were made in which order, and of which file every descriptor was (`-y`).
"""

from __future__ import annotations

import posixpath
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import CHECKOUT
from tests.crash.conftest import Campaign
from tests.crash.scenarios import SCENARIOS
from tests.crash.world import copy_data_dir

_TRACED = (
    "open,openat,creat,write,writev,pwrite64,ftruncate,sendfile,copy_file_range,fsync,fdatasync,"
    "rename,renameat,renameat2,link,linkat"
)
_LINE = re.compile(r"(?P<at>\d+\.\d+) (?P<name>\w+)\((?P<args>.*)\) += (?P<value>-?\d+)(?:<(?P<path>[^>]*)>)?")
_DESCRIPTOR = re.compile(r"\d+<([^>]*)>")
_PATH = re.compile(r'"((?:[^"\\]|\\.)*)"')
_RUN = """
import sys
from pathlib import Path
from tests.crash.scenarios import SCENARIOS, Run
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
                args = found["args"]
                opened = [found["path"]] if found["path"] else []
                paths = opened or _PATH.findall(args) or _DESCRIPTOR.findall(args)
                steps.append((float(found["at"]), Step(log.suffix, found["name"], args, tuple(paths))))
    return [step for _, step in sorted(steps, key=lambda pair: pair[0])]


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
        elif name in ("write", "writev", "pwrite64", "ftruncate", "sendfile", "copy_file_range"):
            volatile |= {inodes[path] for path in paths[-1:] if path in inodes}
        elif name in ("fsync", "fdatasync"):
            volatile -= {inodes.get(paths[0])}
            if pending.get(thread) == paths[0]:
                del pending[thread]
        elif name.startswith(("rename", "link")):
            source, target = map(posixpath.normpath, paths[-2:])
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


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name not in ("push", "verify")])
def test_whatever_has_a_name_is_durable_and_was_made_so_in_order(campaigning: Campaign, name: str) -> None:
    world = campaigning.world
    disk = world.root / "traced" / name
    disk.parent.mkdir(exist_ok=True)
    copy_data_dir(world.base(SCENARIOS[name].base), disk)
    (logs := world.root / "traced" / f"{name}-logs").mkdir()
    command = ["strace", "-ff", "-ttt", "-y", "-qq", "-e", f"trace={_TRACED}", "-o", f"{logs}/of", sys.executable]
    words = [world.root, world.host, world.image, name, disk / "data"]
    done = subprocess.run(
        [*command, "-c", _RUN, *map(str, words)], cwd=CHECKOUT, check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = _steps(logs.iterdir())
    assert [*_too_early(steps, str(disk / "data" / "system"))] == []
    made = Counter(step.name for step in steps)
    assert made["fsync"] + made["fdatasync"] > 0
    assert made["rename"] + made["renameat"] + made["renameat2"] > 0


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
