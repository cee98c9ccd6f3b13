"""The tests: a real PostgreSQL, real HTTP, real processes."""

import pytest

pytest.register_assert_rewrite("tests.rows", "tests.support")
