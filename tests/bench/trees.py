"""A tree of files for archiving."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

from systemfiles.foundation import cpio

TREE_SIZE = 60_000_000
_WORDS = ("kernel", "initrd", "module", "device", "console", "mount", "overlay", "network", "root", "\n")


def make_tree(root: Path, *, files: int) -> None:
    """About 60 MB in so many files of all sizes, half of them noise and half text; the same bytes every time."""
    chance = random.Random(1)
    text = " ".join(chance.choices(_WORDS, k=100_000)).encode()
    for number in range(files):
        size = min(int(chance.expovariate(files / TREE_SIZE)), len(text))
        path = root / f"directory-{number % 60}" / f"file-{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(chance.randbytes(size) if number % 2 else text[-size:])


def walk(root: Path) -> Iterator[cpio.Record]:
    """What is below `root`, as records whose content is read when they are written."""
    for directory, _, files in os.walk(root):
        inside = directory[len(str(root)) + 1 :]
        if inside:
            yield cpio.directory(inside)
        for name in files:
            yield cpio.file(f"{inside}/{name}", Path(directory, name))
