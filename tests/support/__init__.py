"""What several tests share: a tiny engine, a Redis of our own, a running line."""

import pytest

pytest.register_assert_rewrite("tests.support.line")
