"""One registry, many hosts: a release and an update reach all of them, whatever becomes of some on the way."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import pytest

from systemfiles import SystemFiles
from systemfiles.content.artifacts import Artifact
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.digest import Digest, hash_file
from systemfiles.release.dist import read_dist
from systemfiles.release.publishing import publish
from systemfiles.sources.oci import Repository
from tests.registries import registry
from tests.release.conftest import entries, new_key
from tests.release.fleet import Fleet, Host

HOSTS = 200 if os.environ.get("SYSTEMFILES_TEST_FULL") else 50
SLOW = 20_000  # bytes a second
SEED = 7
RELEASE, UPDATE = ("k-1", "i-1"), ("k-2", "i-2")
PLACE = "fleet"
Sums = tuple[str, str]


@dataclass
class Simulation:
    """A fleet that took a release and then an update."""

    fleet: Fleet
    sums: dict[tuple[str, str], Sums]
    """The sha256 of the two files that a host boots, by the versions."""
    parts: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    """The digests of all that a host needs of each."""
    had: dict[tuple[str, str], list[Sums]] = field(default_factory=dict)
    """What each host had after each."""

    @property
    def blobs(self) -> set[str]:
        return set().union(*self.parts.values())

    @property
    def killed(self) -> list[Host]:
        return [host for host in self.fleet.hosts if any(life.killed for life in host.lives)]

    @property
    def untouched(self) -> list[Host]:
        return [host for host in self.fleet.hosts if not any(life.killed for life in host.lives)]


@pytest.fixture(scope="module")
def simulation(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulation]:
    root = tmp_path_factory.mktemp("fleet")
    key, artifacts, choose = new_key(root / "keys"), read_dist(dist), random.Random(SEED)
    with registry(root / "registry", level="info") as running:
        fleet = Fleet(root, running, PLACE, [key.public])
        with fleet.running():
            slow = {*choose.sample(range(1, HOSTS), HOSTS // 6)}
            canary, *others = [fleet.add(SLOW if number in slow else None) for number in range(HOSTS)]
            simulation = Simulation(fleet, {})
            for pair in (RELEASE, UPDATE):
                released = [each for each in artifacts if each.version in pair]
                for _ in publish(released, f"{running.host}/{PLACE}", [key.private]):
                    pass
                simulation.parts[pair] = {blob for each in released for blob in _blobs(running.host, each)}
                simulation.sums[pair] = _sums(released, pair)
                fleet.provide([canary], pair, {})
                fleet.provide(others, pair, _deaths(choose, canary.told["moments"]))
                simulation.had[pair] = [_on_disk(host) for host in fleet.hosts]
                for host in simulation.killed:
                    host.let_time_pass()
            yield simulation


def _deaths(choose: random.Random, moments: int) -> dict[int, list[int]]:
    """Which hosts are killed, each at which moments of its work; some of them are killed again when they come back."""
    return {
        number: [choose.randrange(1, moments) for _ in range(choose.choice((1, 1, 2)))]
        for number in choose.sample(range(1, HOSTS), HOSTS // 4)
    }


def _blobs(host: str, artifact: Artifact) -> Iterator[str]:
    if artifact.arch is not Arch.X86_64:
        return
    repository = Repository(host, f"{PLACE}/{artifact.kind}")
    entry = entries(repository.manifest(artifact.version).value)["amd64"]
    value = repository.manifest(entry["digest"]).value
    yield from (part["digest"] for part in (value["config"], *value["layers"]))


def _sums(released: list[Artifact], pair: tuple[str, str]) -> Sums:
    by_version = {each.version: each for each in released if each.arch is Arch.X86_64}
    kernel, initrd = (by_version[version] for version in pair)
    return kernel.files[kernel.file].sha256, initrd.files[initrd.file].sha256


def _on_disk(host: Host) -> Sums:
    kernel, initrd = (Path(host.files[kind]["path"]) for kind in ("kernel", "initrd"))
    return hash_file(kernel)[0].hex, hash_file(initrd)[0].hex


@pytest.mark.parametrize("pair", [RELEASE, UPDATE], ids=["release", "update"])
def test_every_host_has_the_bytes_of_the_release(simulation: Simulation, pair: tuple[str, str]) -> None:
    assert simulation.had[pair] == [simulation.sums[pair]] * HOSTS


def test_hosts_were_killed_in_the_middle_of_it(simulation: Simulation) -> None:
    lives = [life for host in simulation.killed for life in host.lives]
    assert len(simulation.killed) > HOSTS // 5
    sent = simulation.fleet.bodies()
    assert any(life.killed and sent[life.place] for life in lives)  # this one had begun to fetch
    found = [len(parts & life.had) / len(parts) for parts in simulation.parts.values() for life in lives]
    assert any(0 < share < 1 for share in found)  # and this one found half of it


def test_the_registry_sends_each_blob_once_to_a_host(simulation: Simulation) -> None:
    bodies = simulation.fleet.bodies()
    for host in simulation.untouched:
        sent = [*chain.from_iterable(bodies[life.place].elements() for life in host.lives)]
        assert sorted(blob for blob in sent if blob in simulation.blobs) == sorted(simulation.blobs)
        assert len({*sent}) == len(sent)  # nor anything else of it


def test_a_host_that_was_killed_asks_only_for_what_it_lacks(simulation: Simulation) -> None:
    """What was on its way when it was killed is sent once more; what had arrived is not."""
    bodies = simulation.fleet.bodies()
    for life in chain.from_iterable(host.lives for host in simulation.killed):
        sent = bodies[life.place]
        assert {*sent.values()} <= {1}
        assert not {*sent} & life.had


def test_nothing_is_left_of_what_was_not_killed(simulation: Simulation) -> None:
    assert [path for host in simulation.untouched for path in host.tmp] == []


def test_a_host_that_was_killed_is_clean_after_its_next_collection(simulation: Simulation) -> None:
    for host in simulation.killed:
        assert SystemFiles(host.data, catalog=host.data.with_suffix(".toml")).collect().problems == ()
        assert host.tmp == []


def test_there_is_nothing_to_find_fault_with(simulation: Simulation) -> None:
    assert [str(fault) for host in simulation.fleet.hosts for fault in SystemFiles(host.data).verify().problems] == []


def test_a_host_that_lost_a_kernel_fetches_just_that(simulation: Simulation) -> None:
    host, *_ = simulation.untouched
    _lose(host, "kernel")
    simulation.fleet.provide([host], UPDATE, {})
    _require_healed(simulation, host, "kernel")


def test_a_host_whose_kernel_was_truncated_fetches_it_again(simulation: Simulation) -> None:
    _, host, *_ = simulation.untouched
    kernel = Path(host.files["kernel"]["path"])
    kernel.chmod(0o644)
    os.truncate(kernel, 1000)  # and the blob, which is the same file
    simulation.fleet.provide([host], UPDATE, {})
    _require_healed(simulation, host, "kernel")


def test_a_host_that_lost_its_initrd_can_start_a_vm_from_its_record(simulation: Simulation) -> None:
    *_, host = simulation.untouched
    _lose(host, "initrd")
    simulation.fleet.restore(host)
    _require_healed(simulation, host, "initrd")


def _lose(host: Host, kind: str) -> None:
    """Removes the file that is booted, wherever it is."""
    Path(host.files[kind]["path"]).unlink()
    (host.paths.oci_cache / "blobs" / "sha256" / host.files[kind]["sha256"]).unlink()


def _require_healed(simulation: Simulation, host: Host, kind: str) -> None:
    assert _on_disk(host) == simulation.sums[UPDATE]
    assert SystemFiles(host.data).verify().problems == ()
    sent = simulation.fleet.bodies()[host.lives[-1].place]
    lost = Digest.from_hex(host.files[kind]["sha256"])
    assert [blob for blob in sent.elements() if blob in simulation.blobs] == [lost]
