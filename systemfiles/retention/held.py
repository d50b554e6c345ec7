"""What whoever takes a lease has in hand."""

from __future__ import annotations

import contextlib
from types import TracebackType

from systemfiles.bootfiles import BootFiles
from systemfiles.foundation.errors import LeaseNotFound
from systemfiles.registry.leases import Lease
from systemfiles.registry.registry import Registry


class HeldLease:
    """A live lease on a kernel and an initrd. In a `with` block it is released at the end of it."""

    def __init__(self, registry: Registry, lease: Lease, files: BootFiles) -> None:
        self._registry = registry
        self._lease = lease
        self.files = files

    @property
    def id(self) -> str:
        """What `SystemFiles.renew` and `release` know it by, in any process."""
        return self._lease.id

    @property
    def holder(self) -> str:
        return self._lease.holder

    @property
    def expires_at(self) -> int | None:
        """UTC seconds; None is without end."""
        return self._lease.expires_at

    def renew(self, ttl: float | None = None) -> None:
        """Lets it end `ttl` seconds from now, None is without end. Raises LeaseNotFound when it has ended."""
        self._lease = self._registry.leases.renew(self.id, now=self._registry.clock(), ttl=ttl)

    def release(self) -> None:
        """Ends it. Raises LeaseNotFound when it has ended."""
        self._registry.leases.release(self.id, now=self._registry.clock())

    def __enter__(self) -> HeldLease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(LeaseNotFound):  # it may have expired
            self.release()
