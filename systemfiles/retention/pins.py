"""Pins: named holds without end, each a file, so that they survive the registry.

::

    system/pins/snapshot-42.json
    {"schema": 1, "name": "snapshot-42", "created_at": "2026-11-20T09:41:37Z", "hypervisor": "v49.0", "labels": {},
     "kernel": {"version", "arch", "sha256", "size", "record": {…}},
     "initrd": {"version", "arch", "sha256", "size", "content_sha256", "record": {…}}}

No path of this host is in it. `record` is what artifact.json said, without when and by which release it was written:
all that is needed to put the files together again from their blobs. A pin is written and removed under the content
store's lock, and so is the last look of a collection before it removes anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from systemfiles.content.artifacts import boot_file, parse_record
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.errors import (
    IntegrityError,
    PinNotFound,
    StoreError,
    UnsupportedArch,
    UsageError,
)
from systemfiles.foundation.files import fsync_path, storing, write_file
from systemfiles.foundation.paths import INITRD, KERNEL, Paths

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_RULE = "a-z, A-Z, 0-9, '_', '.', '-'; a letter or digit first; at most 128 characters"
_LARGEST = 1 << 20
_BAD_RECORD = (IntegrityError, UnsupportedArch)


@dataclass(frozen=True, slots=True)
class PinnedFile:
    """A kernel or an initrd that is held; `record` describes the artifact."""

    kind: str
    version: str
    arch: Arch
    sha256: str
    size: int
    record: Mapping[str, Any]
    content_sha256: str | None = None

    def to_json(self) -> dict[str, Any]:
        plain = {"version": self.version, "arch": self.arch.value, "sha256": self.sha256, "size": self.size}
        if self.content_sha256:
            plain["content_sha256"] = self.content_sha256
        return {**plain, "record": dict(self.record)}


@dataclass(frozen=True, slots=True)
class Pin:
    """A named hold on a kernel and an initrd. `created_at` is ISO 8601, UTC."""

    name: str
    kernel: PinnedFile
    initrd: PinnedFile
    created_at: str
    hypervisor: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def files(self) -> tuple[PinnedFile, PinnedFile]:
        return self.kernel, self.initrd

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "name": self.name,
            "created_at": self.created_at,
            "hypervisor": self.hypervisor,
            "labels": dict(self.labels),
            KERNEL: self.kernel.to_json(),
            INITRD: self.initrd.to_json(),
        }


class Pins:
    """The pins of one data directory. Reading needs no lock."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths

    def get(self, name: str) -> Pin:
        """The pin. Raises PinNotFound, UsageError for a bad name, StoreError for a damaged one."""
        path = self._path(name)
        try:
            with path.open("rb") as stream:
                raw = stream.read(_LARGEST + 1)
        except FileNotFoundError:
            raise PinNotFound(name, looked_in=self._paths.pins) from None
        except OSError as error:
            msg = f"{path} cannot be read ({error.strerror})"
            raise StoreError(msg) from error
        try:
            return _pin(json.loads(raw), name)
        except (ValueError, KeyError, TypeError, RecursionError, *_BAD_RECORD) as error:
            msg = f"the pin {path} is damaged"
            hint = f"restore it from a backup, or end it: systemfiles unpin {name}; until then nothing is collected"
            raise StoreError(msg, hint=hint) from error

    def names(self) -> list[str]:
        """All names, sorted."""
        try:
            return sorted(path.stem for path in self._paths.pins.iterdir() if path.suffix == ".json")
        except FileNotFoundError:
            return []
        except OSError as error:
            msg = f"{self._paths.pins} cannot be listed ({error.strerror})"
            raise StoreError(msg) from error

    def __iter__(self) -> Iterator[Pin]:
        """All pins, by name. Raises StoreError for a damaged one."""
        for found in self.each():
            if isinstance(found, StoreError):
                raise found
            yield found

    def each(self) -> Iterator[Pin | StoreError]:
        """All pins, by name, and of a damaged one what is wrong with it. Raises StoreError when none can be listed."""
        for name in self.names():
            try:
                yield self.get(name)
            except PinNotFound:
                continue  # removed meanwhile
            except StoreError as error:
                yield error
            except UsageError as error:
                msg = f"{self._paths.pins / name}.json is no pin: {error.summary}"
                yield StoreError(msg, hint="move it away: nothing is collected while it is there")

    def write(self, pin: Pin) -> None:
        """Makes it durable. Call it under the content store's lock. Raises UsageError, StoreError."""
        _require_texts(pin)
        data = json.dumps(pin.to_json(), indent=1, sort_keys=True).encode() + b"\n"
        if len(data) > _LARGEST:
            msg = f"the pin {pin.name} would take {len(data)} bytes"
            raise UsageError(msg, details=[("allowed", f"{_LARGEST} bytes")])
        if _pin(json.loads(data), pin.name) != pin:
            msg = f"the pin {pin.name} would be read as another one"
            raise StoreError(msg)
        write_file(self._path(pin.name), data, scratch=self._paths.tmp, mode=0o644)

    def remove(self, name: str) -> None:
        """Call it under the content store's lock. Raises PinNotFound, StoreError."""
        path = self._path(name)
        with storing(path):
            try:
                path.unlink()
            except FileNotFoundError:
                raise PinNotFound(name, looked_in=self._paths.pins) from None
            fsync_path(path.parent)

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            msg = f"{name!r:.200} cannot be the name of a pin"
            raise UsageError(msg, details=[("allowed", _RULE)])
        return self._paths.pins / f"{name}.json"


def _require_texts(pin: Pin) -> None:
    """Raises UsageError unless what a caller says of a pin can be read again."""
    if pin.hypervisor is not None and not (isinstance(pin.hypervisor, str) and pin.hypervisor.isprintable()):
        msg = f"{pin.hypervisor!r:.200} cannot be the hypervisor of a pin"
        raise UsageError(msg, details=[("allowed", "a text of printable characters")])
    for label in pin.labels.items():
        if not all(isinstance(part, str) for part in label):
            msg = f"{label!r:.200} cannot be a label of a pin"
            raise UsageError(msg, details=[("allowed", "a text, and a text as its value")])


def _pin(value: Any, name: str) -> Pin:
    _require(isinstance(value, dict) and value["schema"] == 1 and value["name"] == name)
    labels, hypervisor = value["labels"], value["hypervisor"]
    _require(isinstance(labels, dict) and all(isinstance(text, str) for text in labels.values()))
    _require(isinstance(hypervisor, str | None) and isinstance(value["created_at"], str))
    kernel, initrd = (_file(kind, value[kind], name) for kind in (KERNEL, INITRD))
    return Pin(name, kernel, initrd, value["created_at"], hypervisor, labels)


def _file(kind: str, value: Any, name: str) -> PinnedFile:
    record = parse_record(json.dumps(value["record"]).encode(), f"the pin {name}")
    arch, content = Arch.parse(value["arch"]), value["content_sha256"] if kind == INITRD else None
    _require((record["kind"], record["version"], record["arch"]) == (kind, value["version"], arch.value))
    facts = record["files"][boot_file(kind, arch)]
    _require((facts["sha256"], facts["size"]) == (value["sha256"], value["size"]))
    _require(kind == KERNEL or record["content_sha256"] == content)
    return PinnedFile(kind, value["version"], arch, value["sha256"], value["size"], record, content)


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError
