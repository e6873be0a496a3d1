"""The tests of chatd, one file for each section of chatd.py and one for its page.

harness.py holds what several of them need, conftest.py their fixtures.
"""

import pytest

pytest.register_assert_rewrite("tests.client", "tests.harness")
