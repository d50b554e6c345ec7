"""Linters as tests, so that one command says everything."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent
BESIDE_PYTHON = Path(sys.executable).parent


def accepts(*command: str | Path) -> None:
    done = subprocess.run(
        [str(word) for word in command], cwd=CHECKOUT, check=False, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command[0]} complains:\n{done.stdout}{done.stderr}"


def module(name: str) -> tuple[str, ...]:
    return sys.executable, "-m", name


def program(name: str) -> str:
    """A program of this virtual environment, activated or not, else one of the host."""
    found = shutil.which(name, path=str(BESIDE_PYTHON)) or shutil.which(name)
    assert found, f"{name} is not installed: doit setup tests=yes"
    return found


def test_ruff_finds_nothing() -> None:
    accepts(*module("ruff"), "check")


def test_ruff_would_format_nothing_differently() -> None:
    accepts(*module("ruff"), "format", "--check")


def test_the_types_of_the_package_hold() -> None:
    accepts(*module("mypy"), "--strict", "-p", "systemfiles")


def test_the_types_of_the_tests_hold() -> None:
    accepts(*module("mypy"), "--strict", "--explicit-package-bases", "--exclude", "tests/bench", "tests", "dodo.py")


def test_the_types_of_the_benchmarks_hold() -> None:
    accepts(*module("mypy"), "--strict", "tests/bench")


def test_modules_import_only_from_floors_below_them() -> None:
    accepts(program("lint-imports"), "--no-cache")


def test_words_are_spelled_right() -> None:
    accepts(*module("codespell_lib"))


def test_shellcheck_finds_nothing_in_what_runs_in_guests() -> None:
    scripts = sorted((CHECKOUT / "systemfiles" / "recipes" / "guest").glob("*.sh"))
    assert scripts
    accepts(program("shellcheck"), *scripts)
