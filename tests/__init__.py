import pytest

pytest.register_assert_rewrite("tests.reference")  # its asserts are explained as those of tests
