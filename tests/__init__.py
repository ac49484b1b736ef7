import pytest

# Helpers that assert: a failure shows the values compared, as in a test module.
pytest.register_assert_rewrite("tests.bad_input", "tests.handles")
