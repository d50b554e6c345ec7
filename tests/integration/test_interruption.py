"""Ctrl-C while something is fetched: a message, no traceback, nothing left, and the next run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import ARCHES, CHECKOUT, Provisioned
from tests.integration.support import Completed, Mirror, tree

DOIT = [sys.executable, "-m", "doit"]
PROVISION = [sys.executable, "-m", "systemfiles.cli", "provision", "--profile", "debian", "--arch", ",".join(ARCHES)]
COMMANDS = {
    "doit": [*DOIT, "profile=debian", f"arch={','.join(ARCHES)}", "data_dir={}"],
    "doit -n 2": [*DOIT, "-n", "2", "profile=debian", f"arch={','.join(ARCHES)}", "data_dir={}"],
    "doit -n 4": [*DOIT, "-n", "4", "profile=debian", f"arch={','.join(ARCHES)}", "data_dir={}"],
    "systemfiles provision": [*PROVISION, "--data-dir", "{}"],
}


def run(
    command: list[str], data_dir: Path, *, interrupt_after: Mirror | None = None, number: int = signal.SIGINT
) -> Completed:
    """Runs a command in a process group of its own, as a terminal does; presses Ctrl-C once something is fetched."""
    words = [word.replace("{}", str(data_dir)) for word in command]
    with subprocess.Popen(
        words, cwd=CHECKOUT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0
    ) as process:
        if interrupt_after is not None:
            until = time.monotonic() + 60
            while not any(name.startswith("kernel") for name in interrupt_after.requests):
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.05)
            time.sleep(0.5)
            os.killpg(process.pid, number)
        output, errors = process.communicate(timeout=120)
    return subprocess.CompletedProcess(words, process.returncode, output, errors)


@pytest.mark.parametrize(
    ("command", "number"),
    [*((command, signal.SIGINT) for command in COMMANDS), ("systemfiles provision", signal.SIGTERM)],
)
def test_an_interrupted_run_says_so_leaves_nothing_and_the_next_one_goes_on(
    command: str, number: int, provisioned: Provisioned, mirror: Mirror, tmp_path: Path
) -> None:
    lock = tmp_path / "system" / "versions.lock"
    lock.parent.mkdir()
    lock.write_bytes((provisioned.data_dir / "system" / "versions.lock").read_bytes())
    mirror.pause = 0.02
    ran = run(COMMANDS[command], tmp_path, interrupt_after=mirror, number=number)
    assert ran.returncode == (128 + number if command == "systemfiles provision" else 1), ran.stdout + ran.stderr
    assert "interrupted; nothing half-done is left, run it again to go on" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not tree(tmp_path / "tmp")
    mirror.pause = 0
    again = run(COMMANDS[command], tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("vmlinux\n") + again.stdout.count("Image\n") == len(ARCHES)


def test_two_runs_at_once_make_each_thing_once_and_agree(
    provisioned: Provisioned, mirror: Mirror, tmp_path: Path
) -> None:
    lock = tmp_path / "system" / "versions.lock"
    lock.parent.mkdir()
    lock.write_bytes((provisioned.data_dir / "system" / "versions.lock").read_bytes())
    with ThreadPoolExecutor() as pool:
        one, other = pool.map(lambda command: run(COMMANDS[command], tmp_path), ("doit", "doit -n 4"))
    assert (one.returncode, other.returncode) == (0, 0), one.stderr + other.stderr
    assert one.stdout.split("\n\n")[-1] == other.stdout.split("\n\n")[-1]
    assert mirror.requests == sorted(f"{kind} {arch}" for kind in ("kernel", "busybox") for arch in ARCHES)
    assert not tree(tmp_path / "tmp")
