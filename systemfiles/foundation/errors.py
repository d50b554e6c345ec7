"""Every error this package raises on purpose: what happened, to what, what was expected, what to do.

An error is one line (`summary`), facts in named columns (`details`), and perhaps a `hint`. `str(error)` is all of
them, ready to print::

    kernel ch-v6.16.9 (x86_64) is not provisioned
      looked in   /var/lib/systemfiles/system/kernel/ch-v6.16.9/x86_64
      provide it  systemfiles provision --kernel ch-v6.16.9
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable, Iterator, Mapping, Sequence

Details = Iterable[tuple[str, object]]


class SystemFilesError(Exception):
    """Base of all errors. Attributes: `summary`, `details` ((label, value) pairs), `hint`, and each kind's facts."""

    def __init__(self, summary: str, *, details: Details = (), hint: str | None = None) -> None:
        super().__init__(summary)
        self.summary = summary
        self.details = tuple((label, str(value)) for label, value in details)
        self.hint = hint

    def __str__(self) -> str:
        rows = [*self.details]
        if self.hint:
            rows.append(("hint", self.hint))
        width = max((len(label) for label, _ in rows), default=0)
        return "\n".join([self.summary, *(f"  {label:<{width}}  {value}" for label, value in rows)])

    def __reduce__(self) -> tuple[object, ...]:
        # Exception's own pickling calls the class with `args`, which no subclass here accepts.
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[SystemFilesError], args: tuple[object, ...], facts: dict[str, object]) -> SystemFilesError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(facts)
    return error


class InvalidName(SystemFilesError):
    """A version name that may not become part of a path."""

    def __init__(self, kind: str, name: str, *, rule: str) -> None:
        super().__init__(f"{name!r} is not a valid {kind} version", details=[("allowed", rule)])
        self.name = name


class InvalidDigest(SystemFilesError):
    """A text that should be a digest is none."""

    def __init__(self, text: str) -> None:
        super().__init__(
            f"{text[:100]!r} is not a digest", details=[("expected", "sha256: and 64 lower-case hex digits")]
        )
        self.text = text


class UsageError(SystemFilesError):
    """A variable, option or value that does not exist. The command did nothing."""


class CatalogError(SystemFilesError):
    """versions.toml or versions.lock says something impossible. `faults` holds every one, as (where, what)."""

    def __init__(self, path: object, faults: Iterable[tuple[str, str]], *, hint: str | None = None) -> None:
        self.faults = tuple(faults)
        many = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__(f"{path} has {many}", details=self.faults, hint=hint)
        self.path = path


class UnknownVersion(SystemFilesError):
    """Neither the disk nor the catalog nor versions.lock knows this version."""

    def __init__(self, kind: str, version: str, *, known: Iterable[str]) -> None:
        self.known = tuple(known)
        super().__init__(
            f"there is no {kind if kind == 'profile' else f'{kind} version'} {version!r}",
            details=[("known", ", ".join(self.known) or "none")],
            hint="add it to versions.toml"
            + (
                f", or take a local build in: systemfiles add kernel FILE --version {version}"
                if kind == "kernel"
                else ""
            ),
        )
        self.kind = kind
        self.version = version


class UnsupportedArch(SystemFilesError):
    """An architecture that nothing here is built for, or that one version does not exist for."""

    def __init__(self, arch: str, *, supported: Iterable[str], subject: str = "systemfiles") -> None:
        self.supported = tuple(supported)
        super().__init__(
            f"{subject} does not support the architecture {arch!r}", details=[("supported", ", ".join(self.supported))]
        )
        self.arch = arch


class NotProvisioned(SystemFilesError):
    """A version is not (wholly) on this disk. `provide` is the command that provides it."""

    def __init__(
        self,
        kind: str,
        version: str,
        arch: str,
        *,
        looked_in: object,
        stands_for: str = "",
        provide: str | None = None,
    ) -> None:
        command = ("provide it", provide or f"systemfiles provision --{kind} {version} --arch {arch}")
        rolling = ("ask for", f"{stands_for}, which this rolling name stands for here")
        super().__init__(
            f"{kind} {version} ({arch}) is not provisioned",
            details=[("looked in", looked_in), rolling if stands_for else command],
        )
        self.kind = kind
        self.version = version
        self.arch = arch
        self.looked_in = looked_in


class IncompatiblePair(SystemFilesError):
    """An initrd carries the modules of one kernel and was asked for together with another."""

    def __init__(self, kernel: str, initrd: str, *, requires: str) -> None:
        super().__init__(
            f"initrd {initrd} does not go with kernel {kernel}",
            details=[("requires", f"kernel {requires}, whose modules it carries"), ("got", f"kernel {kernel}")],
        )
        self.kernel = kernel
        self.initrd = initrd
        self.requires = requires


class IntegrityError(SystemFilesError):
    """Bytes are not what they are on record to be."""

    def __init__(self, subject: object, *, expected: object, got: object, consequence: str) -> None:
        super().__init__(
            f"{subject} is not what it should be",
            details=[("expected", expected), ("got", got), ("so", consequence)],
        )
        self.subject = subject
        self.expected = expected
        self.got = got
        self.consequence = consequence


class DigestMismatch(IntegrityError):
    """The sha256 differs."""


class SizeMismatch(IntegrityError):
    """The size in bytes differs."""


class SignatureRefused(IntegrityError):
    """What a registry has of a version is not signed as a trusted key would have signed it. `got` says why."""


class InvalidKernel(SystemFilesError):
    """A file is not a kernel that a VMM can boot on this architecture. `found` says what it is instead."""

    def __init__(self, subject: object, *, expected: str, found: str) -> None:
        super().__init__(
            f"{subject} is not a bootable kernel",
            details=[("expected", expected), ("found", found), ("so", "it was refused")],
        )
        self.subject = subject
        self.expected = expected
        self.found = found


class InvalidArchive(SystemFilesError):
    """An archive (tar layer, .deb, cpio, modules) breaks its format or a limit, or would escape its root."""

    def __init__(self, subject: object, problem: str) -> None:
        super().__init__(f"{subject} is refused: {problem}")
        self.subject = subject
        self.problem = problem


@contextlib.contextmanager
def blaming(subject: object) -> Iterator[None]:
    """Lets errors about a working copy's content name `subject`, which is where it came from."""
    try:
        yield
    except InvalidKernel as error:
        raise InvalidKernel(subject, expected=error.expected, found=error.found) from error
    except InvalidArchive as error:
        raise InvalidArchive(subject, error.problem) from error


class UnknownModule(SystemFilesError):
    """A kernel has no module of that name, neither as a file nor built in. `names` holds all that are unknown."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        super().__init__(
            f"the kernel has no module {', '.join(self.names)}, neither as a file nor built in",
            hint="mend the initrd's `load` and `carry` lists in the catalog",
        )


class VersionConflict(SystemFilesError):
    """A concrete version exists, and today's inputs would make another content under the same name.

    `changes` maps each changed input to (recorded, now).
    """

    def __init__(self, kind: str, version: str, arch: str, *, changes: Mapping[str, tuple[object, object]]) -> None:
        self.changes = dict(changes)
        super().__init__(
            f"{kind} {version} ({arch}) exists and is never changed, but its inputs are not the same any more",
            details=[(name, f"{old} -> {new}") for name, (old, new) in sorted(self.changes.items())],
            hint="give the changed inputs a new version name in versions.toml; the existing artifact was kept",
        )
        self.kind = kind
        self.version = version
        self.arch = arch


class SourceError(SystemFilesError):
    """An origin did not give what was asked of it."""


class SourceUnavailable(SourceError):
    """Nothing that could deliver was reached, or it does not have it. `tried` holds (where, why) pairs.

    `wrong` is the first that delivered something else, if one did.
    """

    def __init__(
        self,
        subject: str,
        *,
        tried: Details,
        hint: str | None = None,
        wanted: str = "fetched",
        wrong: IntegrityError | None = None,
    ) -> None:
        self.tried = tuple((str(where), str(why)) for where, why in tried)
        super().__init__(
            f"{subject} could not be {wanted}",
            details=[("tried", f"{where}: {why}") for where, why in self.tried],
            hint=hint,
        )
        self.subject = subject
        self.wrong = wrong


class SourceRefused(SourceError):
    """An origin answered, and the answer is not acceptable."""

    def __init__(self, subject: str, problem: str, *, hint: str | None = None) -> None:
        super().__init__(f"{subject} was refused: {problem}", hint=hint)
        self.subject = subject
        self.problem = problem


class StoreError(SystemFilesError):
    """The content store or the data directory is damaged, unwritable, or not what it claims to be."""


def require_fault_of_file(error: OSError, path: object) -> None:
    """Raises StoreError where this process is short of something: that says nothing of the file at `path`."""
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        msg = f"{path} cannot be read ({error.strerror})"
        raise StoreError(msg) from error


def unexpected(error: OSError) -> StoreError:
    """What to tell of a failure of the system that nobody foresaw where it happened."""
    return StoreError(f"{error.filename or 'a file'} cannot be used ({error.strerror or error})")


class NotFound(StoreError):
    """The content store does not hold this blob."""

    def __init__(self, digest: str, *, looked_in: object) -> None:
        super().__init__(f"the content store does not hold {digest}", details=[("looked in", looked_in)])
        self.digest = digest


class LockTimeout(StoreError):
    """Another process held a lock for longer than the caller would wait."""

    def __init__(self, path: object, *, seconds: float, holder: str) -> None:
        super().__init__(
            f"waited {seconds:g} s for a lock in vain",
            details=[("lock", path), ("held by", holder)],
            hint="wait for that process, or end it; a lock dies with its process",
        )
        self.path = path
        self.holder = holder


class NoSpace(StoreError):
    """The file system is full."""

    def __init__(self, path: object, *, needed: int | None, free: int) -> None:
        need = "unknown" if needed is None else f"{needed} bytes"
        super().__init__(f"no space left for {path}", details=[("needed", need), ("free", f"{free} bytes")])
        self.path = path
        self.needed = needed
        self.free = free


class SnapshotMismatch(SystemFilesError):
    """What a pin or a VM's record names is not what is there now; `differences` maps each to (recorded, now)."""

    def __init__(self, name: str, *, differences: Mapping[str, tuple[object, object]], hint: str | None = None) -> None:
        self.differences = dict(differences)
        super().__init__(
            f"{name} names other files",
            details=[(what, f"{old} is recorded, {new} was given") for what, (old, new) in self.differences.items()],
            hint=hint,
        )
        self.name = name


class PinNotFound(SystemFilesError):
    """There is no pin of that name."""

    def __init__(self, name: str, *, looked_in: object) -> None:
        super().__init__(f"there is no pin {name!r}", details=[("looked in", looked_in)])
        self.name = name


class AssetNotFound(SystemFilesError):
    """The registry has no such asset, or it is being deleted."""

    def __init__(self, asset_id: str) -> None:
        super().__init__(f"the registry has no asset {asset_id!r}")
        self.asset_id = asset_id


class AssetExists(SystemFilesError):
    """An asset of that id is registered."""

    def __init__(self, asset_id: str) -> None:
        super().__init__(f"asset {asset_id!r} is registered already", hint="delete it first: none is ever replaced")
        self.asset_id = asset_id


class AssetInUse(SystemFilesError):
    """An asset cannot be deleted while it is leased. `holders` says by whom, some of them when they are many."""

    def __init__(self, asset_id: str, *, leases: int, holders: Iterable[str]) -> None:
        self.holders = tuple(holders)
        many = "1 lease" if leases == 1 else f"{leases} leases"
        super().__init__(f"asset {asset_id!r} is held by {many}", details=[("holders", ", ".join(self.holders))])
        self.asset_id = asset_id
        self.leases = leases


class LeaseNotFound(SystemFilesError):
    """There is no such lease: it was released, or it ended and the collection has removed it."""

    def __init__(self, lease_id: str) -> None:
        super().__init__(f"there is no lease {lease_id!r}")
        self.lease_id = lease_id


class LeasesLost(SystemFilesError):
    """The registry was lost and built again without the leases it had, so nothing may be collected yet.

    Or there may be leases in `others`, of which this one does not know.
    """

    def __init__(self, where: object, others: Sequence[str] = ()) -> None:
        lost = f"the registry {where} was built again, and the leases it had are lost"
        elsewhere = f"the registry {where} is not the only one that was used here: there may be leases in"
        again = "let every VM's owner lease again, then collect once with --accept-lost-leases"
        super().__init__(
            f"{elsewhere} {', '.join(others)}" if others else lost,
            details=[("so", "nothing is collected until that is accepted")],
            hint=f"set $SYSTEMFILES_DATABASE_URL alike for all; {again}" if others else again,
        )


class ToolMissing(SystemFilesError):
    """A program or shared library of the host is not installed."""

    def __init__(self, tool: str, *, hint: str) -> None:
        super().__init__(f"{tool} is not installed", hint=hint)
        self.tool = tool


class ToolFailed(SystemFilesError):
    """A program of the host ended with an error."""

    def __init__(self, command: str, *, status: int | str, output: str, hint: str | None = None) -> None:
        super().__init__(
            f"a command failed with status {status}",
            details=[("command", command), ("output", output.strip() or "nothing")],
            hint=hint,
        )
        self.command = command
        self.status = status
        self.output = output
