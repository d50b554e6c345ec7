"""What all boot tests share."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from systemfiles import BootFiles

from . import kernel
from .guest import Host, Provisioned


@pytest.fixture(scope="session")
def built_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], BootFiles]:
    """Makes a kernel with everything built in when it is first asked for, once for the whole run."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    return partial(kernel.provide, base)


@pytest.fixture
def host(provisioned: Provisioned, tmp_path: Path, built_in: Callable[[], BootFiles]) -> Host:
    return Host(provisioned, tmp_path, built_in=built_in)
