"""A process that is told of another registry than the rest: nothing that is leased in either goes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from systemfiles.foundation.errors import LeasesLost
from tests.retention.conftest import Host
from tests.retention.world import DAY


def test_a_collection_that_is_told_of_another_registry_keeps_no_other_from_its_work(host: Host, tmp_path: Path) -> None:
    """As under sudo, which drops the environment."""
    service = replace(host, url=f"sqlite:///{tmp_path}/elsewhere.sqlite")
    service.system.ensure("k-1", "i-1", holder="vm-7")
    for dry_run in (True, False):
        with pytest.raises(LeasesLost, match=r"may be leases in .*elsewhere\.sqlite"):
            host.system.collect(grace=0, keep_last=0, dry_run=dry_run)
    assert not service.system.collect(grace=0, keep_last=0).problems
    assert service.system.resolve("k-1", "i-1").kernel.version == "k-1"


def test_what_is_leased_in_one_of_two_registries_stays(host: Host, tmp_path: Path) -> None:
    host.system.ensure("k-1", "i-1")
    service = replace(host, url=f"sqlite:///{tmp_path}/elsewhere.sqlite")
    service.system.ensure("k-1", "i-1", holder="vm-7")
    host.clock.advance(10 * DAY)
    for dry_run in (True, False):
        with pytest.raises(LeasesLost, match=r"may be leases in .*elsewhere\.sqlite") as caught:
            host.system.collect(grace=0, keep_last=0, dry_run=dry_run)
        assert "$SYSTEMFILES_DATABASE_URL" in str(caught.value.hint)
    with pytest.raises(LeasesLost, match=r"may be leases in registry\.sqlite"):
        service.system.collect(grace=0, keep_last=0)
    service.system.collect(grace=0, keep_last=0, accept_lost_leases=True)
    assert not service.system.collect(grace=0, keep_last=0).gone
    assert service.system.resolve("k-1", "i-1").kernel.version == "k-1"
