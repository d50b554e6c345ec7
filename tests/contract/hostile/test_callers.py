"""Many who want the same at once."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import parse_qsl

import pytest

from systemfiles.sources import transport
from systemfiles.sources.oci import Repository
from systemfiles.sources.transport import Bounds
from tests.contract.answers import REPOSITORY, Answer, Exchange, Request, bearer, body, content, status
from tests.contract.hostile.world import ROOT, TAG, World, an_image, assert_whole, pull
from tests.contract.origins import IMAGE_MANIFEST, digest_of

CALLERS = 16
ENSURE = """
import sys
from concurrent.futures import ThreadPoolExecutor
from systemfiles import SystemFiles

data_dir, catalog, callers = sys.argv[1], sys.argv[2], int(sys.argv[3])
system = SystemFiles(data_dir, catalog=catalog, arch="x86_64")
print("ready", flush=True)
sys.stdin.readline()
with ThreadPoolExecutor(callers) as pool:
    made = list(pool.map(lambda _: system.ensure("k1", "i1"), range(callers)))
assert len(set(made)) == 1
"""


def slowly(answer: Answer) -> Answer:
    """So that all callers are there while the first is still waiting."""

    def slow(x: Exchange) -> None:
        x.closing.wait(0.3)
        answer(x)

    return slow


@pytest.mark.parametrize("processes", [1, 4], ids=["threads", "threads of several processes"])
def test_sixteen_callers_make_one_request_for_a_file_and_for_each_blob(processes: int, world: World) -> None:
    catalog = world.base / "versions.toml"
    pinned = f"{world.registry.reference(TAG)}@{digest_of(world.registry.manifests[TAG][0])}"
    catalog.write_text(
        f'schema = 1\n[initrd.i1]\ninit = "v1.0.0"\nbusybox = "{pinned}"\n[kernel.k1.files.x86_64]\n'
        f'url = "{world.origin.url("/kernel")}"\nsha256 = "{hashlib.sha256(world.kernel).hexdigest()}"\n'
    )
    world.origin.answers["/kernel"] = slowly(content(world.kernel))
    world.registry.answers[world.registry.path("blobs", digest_of(ROOT))] = slowly(content(ROOT))
    words = [sys.executable, "-c", ENSURE, str(world.paths.data_dir), str(catalog), str(CALLERS // processes)]
    running = [
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(processes)
    ]
    for process in running:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in running:
        process.communicate("go\n", timeout=60)
    assert [process.returncode for process in running] == [0] * processes
    assert len(world.origin.asked("/kernel")) == 1
    assert [len(world.registry.asked(f"/blobs/{digest}")) for digest in world.registry.blobs] == [1, 1]
    assert len(world.registry.asked("/manifests/")) == 2
    assert_whole(world)


def test_sixteen_pullers_make_one_request_for_each_blob(world: World) -> None:
    world.monkeypatch.setattr(transport, "BOUNDS", Bounds())
    world.registry.answers[world.registry.path("blobs", digest_of(ROOT))] = slowly(content(ROOT))
    with ThreadPoolExecutor(CALLERS) as pool:
        pulled = list(pool.map(lambda _: pull(world), range(CALLERS)))
    assert len({target.digest for target in pulled}) == 1
    assert [len(world.registry.asked(f"/blobs/{digest}")) for digest in world.registry.blobs] == [1, 1]
    assert_whole(world)


# --- one token for many ---


class Doorkeeper:
    """A registry whose tokens say what they are good for, and its token server; `expire` ends all tokens there are."""

    def __init__(self, world: World) -> None:
        self.epoch = 0
        self.world = world
        world.tokens.answers["/token"] = slowly(self._issue)
        world.registry.guard = self._guard

    def expire(self) -> None:
        self.epoch += 1

    def _issue(self, x: Exchange) -> None:
        scope = dict(parse_qsl(x.request.path.partition("?")[2]))["scope"]
        body(json.dumps({"token": f"{self.epoch}/{scope.rpartition(':')[2]}"}).encode())(x)

    def _guard(self, request: Request) -> Answer | None:
        needed = "pull" if request.method in ("GET", "HEAD") else "pull,push"
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        epoch, _, actions = token.partition("/")
        if epoch == str(self.epoch) and set(needed.split(",")) <= set(actions.split(",")):
            return None
        return bearer(self.world.tokens.url("/token"), scope=f"repository:{REPOSITORY}:{needed}")


def test_threads_share_a_token(world: World) -> None:
    Doorkeeper(world)
    repository = Repository(world.registry.host, REPOSITORY)
    with ThreadPoolExecutor(8) as pool:
        assert len({found.digest for found in pool.map(lambda _: repository.manifest(TAG), range(8))}) == 1
    assert len(world.tokens.requests) == 1


def test_a_pull_of_many_layers_buys_one_token(world: World) -> None:
    Doorkeeper(world)
    world.registry.add_image(*[gzip.compress(bytes([number])) for number in range(12)], tags=[TAG])
    an_image(world)
    assert len(world.tokens.requests) == 1


@pytest.mark.parametrize("repetition", range(3))
def test_those_who_read_and_those_who_write_share_a_token_that_expires(repetition: int, world: World) -> None:
    """Each asks for other rights, and what one of them buys must not be in the way of the others."""
    door = Doorkeeper(world)
    repository = Repository(world.registry.host, REPOSITORY)
    path = world.registry.path("manifests", "new")
    world.registry.answers[path] = status(201)
    assert repository.has_manifest(TAG)
    together = threading.Barrier(8)

    def read() -> bool:
        together.wait(10)
        return repository.has_manifest(TAG)

    def write() -> bool:
        together.wait(10)
        return repository.push_manifest(b"{}", IMAGE_MANIFEST, "new") == digest_of(b"{}")

    for _ in range(3):
        door.expire()
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(work) for work in [read, write] * 4]
            assert all(answer.result() for answer in asked)
    assert len(world.tokens.requests) <= 1 + 2 + 1 + 1  # one for all, once it is known that some write


def test_a_token_that_was_bought_to_read_is_good_to_write_where_that_is_done_as_well(world: World) -> None:
    door = Doorkeeper(world)
    repository = Repository(world.registry.host, REPOSITORY)
    world.registry.answers[world.registry.path("manifests", "new")] = status(201)
    for bought in (1, 2, 3):
        repository.push_manifest(b"{}", IMAGE_MANIFEST, "new")
        assert len(world.tokens.requests) == bought
        door.expire()
        assert repository.has_manifest(TAG)


def test_who_writes_is_not_refused_because_another_is_just_buying_a_token_to_read(world: World) -> None:
    """The token that it waited for is not good enough, and it gets one of its own."""
    Doorkeeper(world)
    repository = Repository(world.registry.host, REPOSITORY)
    world.registry.answers[world.registry.path("manifests", "new")] = status(201)
    issue, buying = world.tokens.answers["/token"], threading.Event()

    def issue_slowly(x: Exchange) -> None:
        buying.set()
        issue(x)

    world.tokens.answers["/token"] = issue_slowly
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(repository.has_manifest, TAG)
        assert buying.wait(10)
        repository.push_manifest(b"{}", IMAGE_MANIFEST, "new")
        assert reading.result()
    assert len(world.tokens.requests) == 2
