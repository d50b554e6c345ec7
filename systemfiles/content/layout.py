"""The content store: an OCI image layout (image-spec, image-layout.md) that other tools may read and write too.

::

    oci-cache/
    ├── oci-layout             {"imageLayoutVersion": "1.0.0"}
    ├── index.json             one descriptor per name; whatever it does not reach, other tools' collection deletes
    └── blobs/sha256/<hex>     mode 0444, complete and verified since the moment the name exists

index.json is only rewritten under the lock `oci-cache`; see content/index.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from systemfiles.content.descriptors import INDEX, MANIFEST, Descriptor, canonical
from systemfiles.content.index import MANAGED, Index, json_object
from systemfiles.foundation.digest import Digest, hash_file
from systemfiles.foundation.errors import (
    DigestMismatch,
    IntegrityError,
    LockTimeout,
    NotFound,
    StoreError,
    require_fault_of_file,
)
from systemfiles.foundation.files import NewFile, fsync_path, make_dirs, publish, scratch_dir, storing, write_file
from systemfiles.foundation.lock import Timeout, locked
from systemfiles.foundation.paths import CONTENT_STORE, Paths

log = logging.getLogger(__name__)

INGESTING = "ingesting"
LARGEST_JSON = 4 << 20
_WALKABLE = (
    MANIFEST,
    INDEX,
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)


class Layout:
    """One OCI image layout. Reading needs no lock; any number of threads and processes may add at once."""

    def __init__(self, paths: Paths, *, timeout: Timeout = None) -> None:
        self._timeout = timeout
        self.root = paths.oci_cache
        self._scratch = paths.tmp
        self._lock = paths.lock(CONTENT_STORE)
        self._index = self.root / "index.json"
        self._ingesting: dict[Path, set[Digest]] = {}
        self._durable: dict[Digest, tuple[int, int]] = {}  # inode and mtime of blobs that were synced through here
        self._holder: int | None = None  # the thread that is inside `exclusively`

    def blob(self, digest: Digest) -> Path:
        """Where the blob with this digest is, or would be."""
        return self.root / "blobs" / "sha256" / digest.hex

    def new_file(self) -> NewFile:
        """A file to write a blob into before its digest is known; see `add`."""
        return NewFile(self._scratch)

    def add(self, new: NewFile, media_type: str, *, annotations: Mapping[str, str] | None = None) -> Descriptor:
        """Takes a finished file in under its digest; an intact blob that is there already is kept instead."""
        digest, size = new.digest(), new.size
        if not self._is_kept(digest, size):
            new.commit(self.blob(digest))
            self._remember(digest)
        return Descriptor(media_type, digest, size, annotations or {})

    def add_bytes(self, data: bytes, media_type: str, *, annotations: Mapping[str, str] | None = None) -> Descriptor:
        """Takes `data` in."""
        digest = Digest.of(data)
        if self._is_kept(digest, len(data)):
            return Descriptor(media_type, digest, len(data), annotations or {})
        with self.new_file() as new:
            new.write(data)
            return self.add(new, media_type, annotations=annotations)

    def add_path(self, path: Path, media_type: str, *, annotations: Mapping[str, str] | None = None) -> Descriptor:
        """Takes the finished file at `path` (in the data directory's tmp/) in; `path` may be gone afterwards."""
        with storing(path):
            digest, size = hash_file(path)
        if not self._is_kept(digest, size):
            publish(path, self.blob(digest))
            self._remember(digest)
        return Descriptor(media_type, digest, size, annotations or {})

    def _is_kept(self, digest: Digest, size: int) -> bool:
        """Whether the blob is here, intact and durable, whoever wrote it; else there is at least a place for it."""
        final = self.blob(digest)
        make_dirs(final.parent)
        if not self.intact(digest, size):
            return False
        with storing(final):
            stamp = _stamp(final)
            if stamp != self._durable.get(digest):
                fsync_path(final)
                fsync_path(final.parent)
                self._durable[digest] = stamp
        return True

    def _remember(self, digest: Digest) -> None:
        """Lets nobody sync a blob again that was just committed: what is pulled is named right after that."""
        with contextlib.suppress(FileNotFoundError):
            self._durable[digest] = _stamp(self.blob(digest))

    def intact(self, digest: Digest, size: int | None = None) -> bool:
        """Whether the blob is here and its bytes have this digest; reads all of it."""
        self.note(digest)
        try:
            path = self.blob(digest)
            if size is not None and path.stat().st_size != size:
                return False
            return hash_file(path)[0] == digest
        except OSError as error:
            require_fault_of_file(error, self.blob(digest))
            return False

    def read(self, digest: Digest, *, limit: int = LARGEST_JSON) -> bytes:
        """The bytes of a small blob, verified. Raises NotFound, DigestMismatch, StoreError."""
        path = self.blob(digest)
        try:
            with path.open("rb") as stream:
                data = stream.read(limit + 1)
        except FileNotFoundError:
            raise NotFound(digest, looked_in=path.parent) from None
        except OSError as error:
            msg = f"{path} cannot be read ({error.strerror})"
            raise StoreError(msg) from error
        if len(data) > limit:
            msg = f"blob {digest} is longer than the {limit} bytes read at once"
            raise StoreError(msg)
        if (got := Digest.of(data)) != digest:
            raise DigestMismatch(path, expected=digest, got=got, consequence="it was not used")
        return data

    def read_json(self, digest: Digest) -> dict[str, Any]:
        """A manifest, index or config. Raises as `read`, and StoreError when it is not a JSON object."""
        return json_object(self.read(digest), str(self.blob(digest)))

    def create(self) -> None:
        """Makes an empty layout where there is none, and a fresh index where it was lost."""
        make_dirs(self.root / "blobs" / "sha256")
        marker = self.root / "oci-layout"
        if not marker.exists():
            data = canonical({"imageLayoutVersion": "1.0.0"})
            write_file(marker, data, scratch=self._scratch, mode=self._shared_mode())
        if not self._index.exists():
            with locked(self._lock, timeout=self._timeout):
                if not self._index.exists():
                    self._write_index(Index.empty())

    def entries(self) -> list[tuple[str | None, Descriptor]]:
        """Every entry of index.json that can be understood, and its name when it has one; `names` is one for each name.

        Raises StoreError when the index is unreadable, or an entry is.
        """
        return self._read_quietly().entries()

    def names(self) -> dict[str, Descriptor]:
        """Every name in index.json and what it points to. Raises StoreError when the index is unreadable."""
        return self._read_quietly().names()

    def exists(self) -> bool:
        """Whether there is a layout here that other tools recognise."""
        return not self.missing()

    def missing(self) -> list[str]:
        """The files that make it a layout and are not there."""
        return [name for name in ("oci-layout", "index.json") if not (self.root / name).exists()]

    def name(self, name: str, target: Descriptor) -> None:
        """Lets `name` point to `target`; everyone else's entries stay as they are."""
        self.create()
        with self.exclusively():
            self._change_index(lambda index: index.named(name, target))

    def unname(self, *names: str) -> None:
        """Drops our entries of these names; call it inside `exclusively`. What they reached is then for the sweep."""
        self._change_index(lambda index: index.without(*names))

    @contextlib.contextmanager
    def exclusively(self, *, behind: bool = False) -> Iterator[None]:
        """While nobody else names or removes anything here, nor begins to rely on a blob that is here.

        With `behind` whoever waits for that comes first: for each of many turns.
        """
        with locked(self._lock, timeout=self._timeout, behind=behind):
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = None

    @contextlib.contextmanager
    def ingesting(self) -> Iterator[None]:
        """Until the block ends, no sweep removes a blob that is added or looked for here, or that is noted.

        The digests are written down before it is looked for the blob: in a directory under tmp/ whose lock dies with
        this process. Blocks in several threads keep each other's digests, too.
        """
        with scratch_dir(self._scratch) as work:
            notes = work / INGESTING
            with storing(notes):
                notes.touch()
                notes.chmod(0o644)  # whatever the umask: others read it before they sweep
            self._ingesting[notes] = set()
            try:
                yield
            finally:
                del self._ingesting[notes]

    def ingested(self) -> set[str]:
        """The digests, in hex, that somebody is about to rely on; call it inside `exclusively`."""
        noted = set[str]()
        with storing(self._scratch), contextlib.suppress(FileNotFoundError):
            for work in [*self._scratch.iterdir()]:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    noted.update((work / INGESTING).read_text().split())
        return noted

    def reachable(self, target: Descriptor, *, strict: bool = False) -> Iterator[Descriptor]:
        """`target` and all that it refers to, each once; a manifest that cannot be read ends its branch.

        When `strict`, only one that is not there does, and for another StoreError or IntegrityError is raised. Then it
        follows what artifacts of other tools refer to as well.
        """
        todo, seen = [target], set[Digest]()
        while todo:
            current = todo.pop()
            if current.digest in seen:
                continue
            seen.add(current.digest)
            yield current
            if current.media_type in _WALKABLE:
                todo += self._children(current.digest, strict=strict)

    def _children(self, digest: Digest, *, strict: bool) -> list[Descriptor]:
        try:
            value = self.read_json(digest)
            parts = [*(value.get("manifests") or ()), *(value.get("layers") or ()), value.get("config")]
            if strict:  # what need not be here, and is needed where it is
                parts += [*(value.get("blobs") or ()), value.get("subject")]
            return [Descriptor.from_json(part) for part in parts if part]
        except (StoreError, IntegrityError, TypeError) as error:
            if strict and not isinstance(error, NotFound):
                raise
            log.info("manifest %s is not followed: %s", digest, error)
            return []

    def verify(self) -> Iterator[IntegrityError]:
        """Re-hashes every blob that index.json reaches; yields what is damaged or missing.

        A damaged blob of ours is removed where that is allowed, so that it is not taken for a good one.
        """
        for name, target in self.names().items():
            for part in self.reachable(target):
                path = self.blob(part.digest)
                consequence = f"{name} is not whole"
                try:
                    got = hash_file(path)[0]
                except OSError as error:
                    found = error.strerror if path.exists() else "no file"
                    yield IntegrityError(path, expected=f"{part.size} bytes", got=found, consequence=consequence)
                    continue
                if got != part.digest:
                    if MANAGED in target.annotations:
                        with contextlib.suppress(StoreError):
                            self.discard(part.digest)
                    yield DigestMismatch(path, expected=part.digest, got=got, consequence=consequence)

    def discard(self, digest: Digest) -> None:
        """Removes a blob that turned out to be damaged, unless somebody has replaced it by a good one meanwhile."""
        path = self.blob(digest)
        with scratch_dir(self._scratch) as work, storing(self.root), contextlib.suppress(FileNotFoundError):
            aside = work / digest.hex
            path.rename(aside)
            if hash_file(aside)[0] == digest:
                with contextlib.suppress(FileExistsError):
                    os.link(aside, path)
            fsync_path(path.parent)

    def note(self, digest: Digest) -> None:
        """Lets no sweep come between the look for a blob and its use, while this process is `ingesting`."""
        missing = {notes: noted for notes, noted in self._ingesting.copy().items() if digest not in noted}
        if not missing:
            return
        with self.exclusively():
            for notes, noted in missing.items():
                with storing(notes), contextlib.suppress(FileNotFoundError), notes.open("a") as out:
                    out.write(f"{digest.hex}\n")  # unless that block, in another thread, has just ended
                noted.add(digest)

    def _read_quietly(self) -> Index:
        """index.json, without the lock. Other tools write it in place, so what looks broken is read again with it."""
        try:
            return Index.read(self._index)
        except StoreError as broken:
            if self._holder == threading.get_ident():
                raise  # it would wait for itself
            try:
                with locked(self._lock, timeout=self._timeout):
                    return Index.read(self._index)
            except LockTimeout:
                raise broken from None

    def _shared_mode(self) -> int:
        """Of what other tools rewrite in place: where a group may write to the directory, it may write to that."""
        return 0o644 | stat.S_IMODE(self.root.stat().st_mode) & stat.S_IWGRP

    def _change_index(self, change: Callable[[Index], Index]) -> None:
        before = Index.read(self._index)
        if (after := change(before)) != before:
            self._write_index(after)

    def _write_index(self, index: Index) -> None:
        index.write(self._index, scratch=self._scratch, mode=self._shared_mode())


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns
