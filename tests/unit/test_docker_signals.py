"""What signals to the launcher do before a container runs, and while one does."""

import signal
import subprocess
import sys

TELL = """
import os, signal
from tml.docker import signals
told = []
signals.as_exceptions()
with signals.as_calls(told.append):
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGTERM)
print(*told)
os.kill(os.getpid(), signal.SIGHUP)
print("lives")
"""


def test_the_end_of_the_terminal_is_a_call_while_a_container_runs_and_else_the_end() -> None:
    done = subprocess.run([sys.executable, "-c", TELL], capture_output=True, text=True, check=False)
    assert done.stdout == f"{int(signal.SIGHUP)} {int(signal.SIGTERM)}\n"
    assert done.returncode == 128 + signal.SIGHUP


def test_under_nohup_the_end_of_the_terminal_is_nothing() -> None:
    argv = ["sh", "-c", 'trap "" HUP; exec "$0" -c "$1"', sys.executable, TELL]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout == f"{int(signal.SIGTERM)}\nlives\n"
