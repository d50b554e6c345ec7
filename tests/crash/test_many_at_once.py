"""Many processes of many threads on one data directory, all of which ask for whatever comes to their mind.

One makes each thing, the others wait and reuse; answers are equal, nothing is left, nobody waits for ever. In a second
run, processes are killed at random, and other tools write to the content store meanwhile.
"""

from __future__ import annotations

import collections
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import TextIOBase
from pathlib import Path

import pytest

from systemfiles.content.layout import Layout
from systemfiles.foundation.errors import NotProvisioned
from systemfiles.foundation.paths import Paths
from tests.conftest import CHECKOUT
from tests.crash import checker
from tests.crash.running import Run
from tests.crash.scenarios import puller
from tests.crash.world import NEW, REF_NAME, World, world
from tests.crowd import PATIENCE, Crowd

PROCESSES, THREADS, SECONDS = (16, 8, 60.0) if os.environ.get("SYSTEMFILES_TEST_FULL") else (6, 4, 8.0)
SEED = 20261120


@dataclass(frozen=True)
class Answer:
    """What a thread was told: of `what` it asked for, the versions and digests."""

    what: str
    told: tuple[str, ...]


def ensure(run: Run, profile: str) -> Answer:
    files = run.system(profile).ensure(timeout=PATIENCE)
    return Answer(f"ensure {profile} {files.kernel.version}", (files.kernel.sha256, files.initrd.content_sha256))


def resolve(run: Run, profile: str) -> Answer:
    try:
        files = run.system(profile).resolve()
    except NotProvisioned:  # as yet
        return Answer("nothing", ())
    return Answer(f"ensure {profile} {files.kernel.version}", (files.kernel.sha256, files.initrd.content_sha256))


def update(run: Run) -> Answer:
    system = run.system("packaged")
    system.provisioner(timeout=PATIENCE).update("packaged", "modular", system.arch)
    return Answer("update", ())


def pull(run: Run) -> Answer:
    target = puller(run).pull(run.world.image, run.system().arch)
    Layout(Paths(run.data), timeout=PATIENCE).name("pulled", target)
    return Answer("pull", (target.digest,))


DEEDS: tuple[Callable[[Run], Answer], ...] = (
    lambda run: ensure(run, "pinned"),
    lambda run: ensure(run, "packaged"),
    lambda run: resolve(run, "pinned"),
    lambda run: resolve(run, "packaged"),
    pull,
    update,
)
WEIGHTS = (10, 10, 10, 10, 10, 1)  # an update asks apt, which takes a second of a processor


def work(here: World, data: Path, seed: int, until: float, log: Path) -> None:
    """One process: its threads do this and that until the time is over, and write down what they were told."""
    os.environ |= {"APT_CONFIG": str(here.apt(NEW)), "no_proxy": "127.0.0.1"}
    with log.open("a", buffering=1) as out:
        threads = [threading.Thread(target=_do, args=(here, data, seed, n, until, out)) for n in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _do(here: World, data: Path, seed: int, number: int, until: float, out: TextIOBase) -> None:
    choose = random.Random(f"{seed}-{number}")
    run = Run(here, data, f"{seed}-{number}")
    deed = DEEDS[(seed + number) % len(DEEDS)]  # each is done, however slow this host is
    while True:
        try:
            answer = deed(run)
            line = json.dumps([answer.what, answer.told])
        except Exception as error:
            line = json.dumps([f"error {type(error).__name__}", [str(error)]])
        out.write(line + "\n")
        if time.monotonic() > until:
            return
        (deed,) = choose.choices(DEEDS, WEIGHTS)


@pytest.fixture
def here(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path / "world") as made:
        yield made


def assert_equal_answers(crowd: Crowd) -> None:
    answers = collections.defaultdict[str, set[tuple[str, ...]]](set)
    for what, told in crowd.lines():
        answers[what].add(tuple(told))
    assert not [(what, told) for what, told in answers.items() if what.startswith("error")]
    assert {f"ensure packaged packaged-{NEW}", "ensure pinned pinned-1", "pull", "update"} <= answers.keys()
    assert {what: len(told) for what, told in answers.items()} == dict.fromkeys(answers, 1)


def assert_whole(data: Path) -> checker.State:
    state = checker.read(data)
    assert state.problems == ()
    return state


def test_one_fetches_and_makes_each_thing_and_all_are_told_the_same(here: World, tmp_path: Path) -> None:
    crowd = Crowd(work, here, tmp_path, seed=SEED, seconds=SECONDS)
    crowd.start(PROCESSES)
    crowd.end()
    assert_equal_answers(crowd)
    assert assert_whole(crowd.data).left == ()
    fetched = collections.Counter(path for path in here.requests if path.endswith((".deb", "vmlinux")))
    assert fetched == {f"/{NEW}/linux-image-test.deb": 1, f"/{NEW}/busybox-static.deb": 1, "/vmlinux": 1}
    blobs = here.registry.requests("GET", "/blobs/")
    assert len(blobs) == len(set(blobs)) > 6


def test_kills_and_other_tools_at_the_same_time_lose_nothing(here: World, tmp_path: Path) -> None:
    crowd = Crowd(work, here, tmp_path, seed=SEED, seconds=SECONDS)
    crowd.start(PROCESSES)
    data, foreign = crowd.data, 0
    while time.monotonic() < crowd.until - 1:
        foreign += 1
        copy_in(here, data, f"foreign-{foreign}")
        crowd.replace()
    crowd.end()
    assert_equal_answers(crowd)
    state = assert_whole(data)
    named = {json.loads(entry)["annotations"][REF_NAME] for entry in state.foreign[1:]}
    assert foreign
    assert named == {f"foreign-{number}" for number in range(1, foreign + 1)}
    # what the killed ones left is removed once it is old
    for path in (data / "tmp").iterdir():
        os.utime(path, (0, 0))
    Run(here, data, "").system("pinned").provisioner().write_manifest()
    assert assert_whole(data).left == ()


def copy_in(here: World, data: Path, name: str) -> None:
    """What an operator's tool does: skopeo copies an image into the content store, under the lock."""
    layout = data / "system" / "oci-cache"
    copy = ["skopeo", "--insecure-policy", "copy", "--quiet", "--src-tls-verify=false"]
    command = [*copy, f"docker://{here.image.partition('@')[0]}", f"oci:{layout}:{name}"]
    words = [sys.executable, "-m", "systemfiles.cli", "lock", "--data-dir", str(data), "--", *command]
    done = subprocess.run(words, cwd=CHECKOUT, check=False, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
