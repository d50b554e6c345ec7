"""What all boot tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from .guest import Host, Provisioned


@pytest.fixture
def host(provisioned: Provisioned, tmp_path: Path) -> Host:
    return Host(provisioned, tmp_path)
