"""What can be seen of pinned files without reading or writing any: whether they are there, and as they were checked.

Whoever uses a file that has another stamp hashes it first (content/artifacts.py); so such a one may well be good.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from systemfiles.content.artifacts import STAMPS, Artifact, Artifacts
from systemfiles.foundation.errors import IntegrityError, NotProvisioned
from systemfiles.retention.pins import Pin
from systemfiles.retention.reasons import id_of_file


def faults(pins: Iterable[Pin], artifacts: Artifacts) -> dict[str, str]:
    """By asset id, what is wrong with those that are pinned: only those that something is wrong with."""
    found: dict[str, str] = {}
    seen = set[str]()
    for pin in pins:
        for file in pin.files:
            if (asset := id_of_file(file)) not in seen:
                seen.add(asset)
                try:
                    fault = _fault(artifacts.load(file.kind, file.version, file.arch))
                except NotProvisioned:
                    fault = "it is not there"
                except IntegrityError:
                    fault = "its record is damaged"
                if fault:
                    found[asset] = f"{fault}: see `systemfiles restore {pin.name} --full`"
    return found


def _fault(artifact: Artifact) -> str:
    facts = artifact.files[artifact.file]
    try:
        stat = artifact.path.lstat()
    except FileNotFoundError:
        return "its file is not there"
    except OSError as error:
        return f"its file cannot be read ({error.strerror})"
    if stat.st_size != facts.size:
        return f"its file has {stat.st_size} bytes instead of {facts.size}"
    if _stamp(artifact.directory / STAMPS, artifact.file) != _expected(stat, facts.sha256):
        return "its file is not as it was checked last"
    return ""


def _expected(stat: os.stat_result, sha256: str) -> list[object]:
    return [stat.st_dev, stat.st_ino, stat.st_mtime_ns, sha256]


def _stamp(stamps: Path, name: str) -> object:
    try:
        return json.loads(stamps.read_bytes())[name]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
