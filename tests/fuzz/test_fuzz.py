"""Every parser that meets foreign bytes takes them, or refuses them by an error of ours, soon and in little memory.

The inputs are made by hypothesis: atheris would see which branches an input takes, but it is built with clang, and has
no wheel for every Python. The usual run has the same inputs each time; $SYSTEMFILES_TEST_FULL asks for many
more, which differ from run to run.
"""

from __future__ import annotations

import os
import random

import pytest

from tests.fuzz.campaign import faults
from tests.fuzz.targets import TARGETS

EXAMPLES = 400
FULL = 25


@pytest.mark.parametrize("name", TARGETS)
def test_only_our_own_errors_come_of_foreign_bytes(name: str) -> None:
    if not os.environ.get("SYSTEMFILES_TEST_FULL"):
        assert faults(name, examples=EXAMPLES) == ""
        return
    seed = random.SystemRandom().getrandbits(32)
    print(f"{name}: seed {seed}")
    assert faults(name, examples=FULL * EXAMPLES, random_seed=seed) == "", f"seed {seed}"
