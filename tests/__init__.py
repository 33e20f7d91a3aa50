import pytest

# What these assert is explained where it fails, as in the tests themselves.
pytest.register_assert_rewrite(*(f"tests.support.{name}" for name in ("check_sharded", "helpers", "training", "ways")))
