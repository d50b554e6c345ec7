"""What README.md shows works as printed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from systemfiles import SystemFiles
from systemfiles.foundation.catalog import read_catalog
from tests.conftest import CHECKOUT, Provisioned

README = (CHECKOUT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.network
def test_the_examples_run_one_after_the_other(provisioned: Provisioned, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    shutil.copytree(provisioned.data_dir, data_dir)
    done = subprocess.run(
        [sys.executable, "-c", "".join(blocks("python"))],
        env={**os.environ, "SYSTEMFILES_DATA_DIR": str(data_dir)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kernel, initrd, *cmdline = done.stdout.split()
    assert Path(kernel).is_file()
    assert Path(initrd).is_file()
    assert cmdline[0].startswith("console=")
    host = SystemFiles(data_dir, profile="debian")
    assert [pin.name for pin in host.pins()] == ["snapshot-42"]
    assert {lease.holder for lease in host.leases()} == {"vm-7"}


def test_the_example_of_a_new_version_is_a_valid_catalog(tmp_path: Path) -> None:
    (sample,) = blocks("toml")
    path = tmp_path / "versions.toml"
    path.write_text(sample)
    assert set(read_catalog(path).kernel) == set(tomllib.loads(sample)["kernel"])


def test_the_two_commands_are_one_line_each() -> None:
    commands = re.findall(r"<!-- command (\d) -->\n```sh\n(.*)\n```", README)
    assert [number for number, _ in commands] == ["1", "2"]
    assert all(command.startswith("python3 -m venv .venv && ") for _, command in commands)
