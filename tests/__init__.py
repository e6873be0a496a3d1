"""The tests of chatd, one file for each section of chatd.py and one for its page.

client.py holds what sees chatd from outside: processes and clients, also for
test_chatd.py. harness.py holds what looks inside, conftest.py the fixtures.
"""

import pytest

pytest.register_assert_rewrite("tests.client", "tests.harness")
