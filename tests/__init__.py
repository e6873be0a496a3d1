"""The tests of chatd, one file for each section of chatd.py, and some for its page.

client.py holds what sees chatd from outside: processes and clients, also for
test_chatd.py. browser.py holds what the tests of the page share, with its fixtures.
harness.py holds what looks inside, conftest.py the other fixtures.
"""

import pytest

pytest.register_assert_rewrite("tests.browser", "tests.client", "tests.harness")
