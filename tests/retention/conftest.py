"""A world for the whole run, and a data directory of one's own in it, with a clock."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pytest

from systemfiles import BootFiles, Collection, SystemFiles
from systemfiles.foundation.arch import Arch
from tests.postgres import postgres  # noqa: F401  # a fixture
from tests.retention.plain import Plain
from tests.retention.world import X86, Clock, World, world


@dataclass
class Host:
    """A data directory, whoever works on it, and what time it is for them."""

    world: World
    data: Path
    clock: Clock = field(default_factory=Clock)
    url: str | None = None
    """Of the registry, when it is not in the data directory."""

    @cached_property
    def system(self) -> SystemFiles:
        return self.at(X86)

    @property
    def plain(self) -> Plain:
        return Plain(self.data)

    def at(self, arch: Arch) -> SystemFiles:
        return self.world.system(self.data, clock=self.clock, arch=arch, url=self.url)

    def provide(self, kernel: str = "k-1", initrd: str = "i-1", *, arch: Arch = X86) -> BootFiles:
        """Provides a pair that no profile names unless told so; a minute passes."""
        system = self.system if arch is X86 else self.at(arch)
        files = system.ensure(kernel, initrd)
        if system is not self.system:
            system.holdings.registry.close()
        self.clock.advance(60)
        return files

    def update(self, release: str) -> BootFiles:
        files = self.world.update(self.system, release)
        self.clock.advance(60)
        return files

    def collect(
        self,
        *,
        dry_run: bool = False,
        grace: int = 0,
        keep_last: int = 0,
        max_cache_bytes: int | None = None,
        accept_lost_leases: bool = False,
    ) -> Collection:
        """A collection that spares nothing for its age unless told so."""
        return self.system.collect(
            dry_run=dry_run,
            grace=grace,
            keep_last=keep_last,
            max_cache_bytes=max_cache_bytes,
            accept_lost_leases=accept_lost_leases,
        )

    def reasons(self, subject: str, *, grace: int = 0) -> list[str]:
        """Why the artifacts of that name are kept, "" for those that are not; nothing is spared for its age if not
        told so."""
        found = self.system.explain(subject, grace=grace, keep_last=0)
        return [each.why if each.kept else "" for each in found if each.what.startswith(("kernel-", "initrd-"))]


@pytest.fixture(scope="session")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Everything that answers; do not change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        with world(tmp_path_factory.mktemp("world") / "world") as made:
            yield made


@pytest.fixture
def host(here: World, tmp_path: Path) -> Host:
    return Host(here, tmp_path / "data")
