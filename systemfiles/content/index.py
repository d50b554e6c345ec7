"""index.json of an OCI image layout (image-spec, image-layout.md): what it says, and how a name comes in and goes.

Other tools write to it as well. Entries and fields that are not ours survive every rewrite; ours carry the annotation
`io.systemfiles.managed`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from systemfiles.content.descriptors import INDEX, Descriptor
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import StoreError
from systemfiles.foundation.files import write_file

REF_NAME = "org.opencontainers.image.ref.name"
MANAGED = "io.systemfiles.managed"
SOURCE = "io.systemfiles.source"
BASE = "io.systemfiles.base"
"""On the entry of an image that initrds are built on."""
_MEND = "restore it from a backup; or remove it: doit writes our entries again, and what others named goes in time"


@dataclass(frozen=True, slots=True)
class Index:
    """What the file says. A change gives another one."""

    value: Mapping[str, Any]

    @classmethod
    def empty(cls) -> Index:
        return cls({"schemaVersion": 2, "mediaType": INDEX, "manifests": []})

    @classmethod
    def read(cls, path: Path) -> Index:
        """The one at `path`, empty when there is none. Raises StoreError when it is unreadable."""
        try:
            value = json_object(path.read_bytes(), str(path))
        except FileNotFoundError:
            return cls.empty()
        except OSError as error:
            msg = f"{path} cannot be read ({error.strerror})"
            raise StoreError(msg) from error
        except StoreError as error:
            raise StoreError(error.summary, hint=_MEND) from error
        entries = value.get("manifests")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            msg = f"{path} is not an OCI image index"
            raise StoreError(msg, hint=_MEND)
        return cls(value)

    def write(self, path: Path, *, scratch: Path, mode: int) -> None:
        """Replaces the file at `path`. Raises StoreError."""
        try:
            data = json.dumps(self.value, indent=1).encode()
        except RecursionError as error:
            msg = f"{path} holds an entry that is nested too deeply to be written again"
            raise StoreError(msg, hint=_MEND) from error
        write_file(path, data, scratch=scratch, mode=mode)

    def entries(self) -> list[tuple[str | None, Descriptor]]:
        """Every entry, and its name when it has one. Raises StoreError for one that cannot be understood."""
        return [(_name_of(entry), Descriptor.from_json(entry)) for entry in self.value["manifests"]]

    def names(self) -> dict[str, Descriptor]:
        """What each name points to: our entry of that name, else the last one."""
        named: dict[str, Descriptor] = {}
        for entry in self.value["manifests"]:
            name = _name_of(entry)
            with contextlib.suppress(StoreError):  # what others write there need not be understood
                if name is not None and (name not in named or MANAGED not in named[name].annotations):
                    named[name] = Descriptor.from_json(entry)
        return named

    def named(self, name: str, target: Descriptor) -> Index:
        """With our entry of this name pointing to `target`."""
        notes = {**target.annotations, REF_NAME: name, MANAGED: "true"}
        entry = Descriptor(target.media_type, target.digest, target.size, notes).to_json()
        if entry in self.value["manifests"]:
            return self
        others = [other for other in self.value["manifests"] if not _is_ours(other, name, target.digest)]
        return Index({**self.value, "manifests": [*others, entry]})

    def without(self, *names: str) -> Index:
        """Without our entries of these names."""
        kept = [entry for entry in self.value["manifests"] if _name_of(entry) not in names or not _is_managed(entry)]
        return Index({**self.value, "manifests": kept})


def json_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `data`. Raises StoreError for anything else, naming `where` it is."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        msg = f"{where} is not JSON ({error})"
        raise StoreError(msg) from error
    if not isinstance(value, dict):
        msg = f"{where} is not a JSON object"
        raise StoreError(msg)
    return value


def _name_of(entry: Mapping[str, Any]) -> str | None:
    annotations = entry.get("annotations")
    name = annotations.get(REF_NAME) if isinstance(annotations, dict) else None
    return name if isinstance(name, str) else None


def _is_managed(entry: Mapping[str, Any]) -> bool:
    annotations = entry.get("annotations")
    return isinstance(annotations, dict) and MANAGED in annotations


def _is_ours(entry: Mapping[str, Any], name: str, digest: Digest) -> bool:
    """Whether an entry is one that we wrote under `name`, perhaps without our mark after another tool's rewrite."""
    if _name_of(entry) != name:
        return False
    return MANAGED in entry["annotations"] or entry.get("digest") == digest
