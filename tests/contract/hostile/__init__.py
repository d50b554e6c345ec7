"""Whatever an origin does: the right bytes, or one typed error with its facts, table by table."""

import pytest

pytest.register_assert_rewrite("tests.contract.hostile.world")
