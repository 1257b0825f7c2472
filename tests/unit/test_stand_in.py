"""How a launcher may end that got SIGINT at any moment."""

import signal

import pytest

from tests.stand_in import REPOSITORY, was_interrupted

STARTING = """Could not import runpy module
Traceback (most recent call last):
  File "<frozen runpy>", line 15, in <module>
  File "/usr/lib/python3.11/functools.py", line 276, in <module>
KeyboardInterrupt
"""
OURS = f"""Traceback (most recent call last):
  File "{REPOSITORY}/tml/docker/__main__.py", line 66, in <module>
KeyboardInterrupt
"""


@pytest.mark.parametrize(
    ("code", "errors", "well"),
    [
        (130, "tml: interrupted\n", True),
        (-signal.SIGINT, OURS, True),
        (1, STARTING, True),
        (1, OURS, False),
        (1, "tml: no such project\n", False),
        (0, "", False),
        (125, STARTING, False),
    ],
)
def test_only_an_interrupt_before_anything_of_ours_may_end_with_1(
    code: int, errors: str, well: bool
) -> None:
    assert was_interrupted(code, errors) == well
