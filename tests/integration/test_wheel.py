"""The wheel, installed outside the checkout, does all of it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import CHECKOUT
from tests.integration.support import Completed, Mirror, completed, done_tasks

pytestmark = pytest.mark.network


@dataclass(frozen=True)
class Installed:
    """The wheel, and a virtual environment with only it and what it depends on."""

    wheel: Path
    environment: Path

    def run(self, *words: str, cwd: Path) -> Completed:
        """Runs `systemfiles` without anything of the checkout or of the caller's Python in sight."""
        env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        return completed([str(self.environment / "bin" / "systemfiles"), *words], cwd=cwd, env=env)


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    base = tmp_path_factory.mktemp("wheel")
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    run(sys.executable, *pip, "wheel", "--no-deps", "--wheel-dir", base, CHECKOUT)
    (wheel,) = base.glob("*.whl")
    run(sys.executable, "-m", "venv", base / "venv")
    run(base / "venv" / "bin" / "python", *pip, "install", wheel)
    return Installed(wheel, base / "venv")


def run(*command: str | Path) -> None:
    done = subprocess.run([*map(str, command)], cwd="/", check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_carries_all_that_is_needed_and_nothing_else(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as wheel:
        names = set(wheel.namelist())
        shipped = wheel.read("systemfiles/versions.toml")
    assert shipped == (CHECKOUT / "versions.toml").read_bytes()
    assert "systemfiles/py.typed" in names
    guest = CHECKOUT / "systemfiles" / "recipes" / "guest"
    assert {f"systemfiles/recipes/guest/{path.name}" for path in guest.glob("init-*.sh")} <= names
    modules = {str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "systemfiles").rglob("*.py")}
    assert modules <= names
    top = {name.split("/")[0] for name in names}
    assert len(top) == 2
    assert {name for name in top if not name.endswith(".dist-info")} == {"systemfiles"}
    kinds = {Path(name).suffix for name in names if name.startswith("systemfiles/")}
    assert kinds == {".py", ".sh", ".sql", ".toml", ".typed"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_a_stranger_learns_from_help_what_to_type_first(installed: Installed, tmp_path: Path) -> None:
    ran = installed.run("--help", cwd=tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "systemfiles provision --profile debian" in ran.stdout
    assert "systemfiles path" in ran.stdout
    assert installed.run("ls", "--catalog", cwd=tmp_path).returncode == 0


def test_it_provisions_and_resolves_in_an_empty_directory(installed: Installed, tmp_path: Path, mirror: Mirror) -> None:
    place = ("--profile", "debian", "--arch", "x86_64", "--data-dir", "data")
    made = installed.run("provision", *place, cwd=tmp_path)
    assert made.returncode == 0, made.stdout + made.stderr
    assert mirror.requests == ["busybox x86_64", "kernel x86_64"]
    found = installed.run("path", *place, cwd=tmp_path)
    assert (found.returncode, found.stderr) == (0, "")
    assert made.stdout.endswith(f"\n\n{found.stdout}")
    for line in found.stdout.splitlines():
        assert Path(line.split()[1]).is_file()
    again = installed.run("provision", *place, cwd=tmp_path)
    assert (again.returncode, done_tasks(again.stdout)) == (0, set())
    assert "everything is up to date" in again.stdout
    # nothing beside the data directory: no .doit.db, no __pycache__
    assert {path.name for path in tmp_path.iterdir()} == {"data"}


def test_its_types_are_for_its_users_too(installed: Installed, tmp_path: Path) -> None:
    sample = tmp_path / "sample.py"
    sample.write_text(
        "from systemfiles import SystemFiles\n"
        "files = SystemFiles(arch='x86_64').resolve('a', 'b')\n"
        "reveal_type(files.kernel.path)\n"
        "reveal_type(files.cmdline('qemu'))\n"
    )
    python = installed.environment / "bin" / "python"
    checked = completed(
        [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python), str(sample)], cwd=tmp_path
    )
    assert checked.returncode == 0, checked.stdout
    assert '"pathlib.Path"' in checked.stdout
    assert "Any" not in checked.stdout
