"""The stand-in project of the launcher's tests: the launcher, called as people call it, the
project's script, which the test writes, and what it has left on the engine.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tml.machines import environment

REPOSITORY = Path(__file__).resolve().parents[1]
STAND_IN = f"p{os.getpid()}/standin"
"""The project that launchers here run, called standin; its path is this process's own, so that test
runs beside each other let one another's containers be.
"""

GRACEFUL = """exec python3 -u -c '
import os, signal, sys, time
def stop(*_):
    print("saving", flush=True)
    time.sleep(float(os.environ.get("LINGER", "0")))
    print("saved", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
'
"""
"""A script that says that it is ready, and when it is stopped takes LINGER seconds to save."""


class Launcher:
    """`python -m tml.docker` on a checkout of its own, with one project whose script the test
    writes.
    """

    def __init__(self, base: Path, home: Path) -> None:
        self.base, self.home = base, home
        self.env = {
            **os.environ,
            environment.TML_BASE: str(base),
            environment.HOME: str(home),
            environment.XDG_STATE_HOME: str(home / ".local" / "state"),
            environment.PYTHONPATH: str(REPOSITORY),
        }
        self.argv = [sys.executable, "-m", "tml.docker"]

    def script(self, text: str) -> None:
        """What the container runs."""
        path = self.base / "projects" / STAND_IN / "scripts" / "run_in_docker.sh"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def __call__(self, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run to the end, with no stdin."""
        return subprocess.run(
            [*self.argv, *argv],
            env={**self.env, **env},
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def start(self, *argv: str, **env: str) -> subprocess.Popen[str]:
        """Start, to be watched and interrupted."""
        return subprocess.Popen(
            [*self.argv, *argv],
            env={**self.env, **env},
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def containers(client: Any, **filters: Any) -> list[Any]:
    """All containers of the stand-in project."""
    label = f"tml.project={STAND_IN}"
    found: list[Any] = client.containers(all=True, filters={"label": label, **filters})
    return found


def networks(client: Any) -> list[Any]:
    """All networks of the stand-in project."""
    found: list[Any] = client.networks(filters={"label": f"tml.project={STAND_IN}"})
    return found


def records(launcher: Launcher) -> list[Path]:
    """The files in which its jobs are noted down."""
    return list((launcher.home / ".local" / "state" / "tml" / "jobs").glob("*.json"))


def record(launcher: Launcher) -> Any:
    """What is noted down of its only job."""
    (path,) = records(launcher)
    return json.loads(path.read_text())


def was_interrupted(code: int, errors: str) -> bool:
    """Whether a launcher that got SIGINT at any moment ended as it should: with 130 once it is at
    work; before, as Python ends any program.

    While Python itself is not up, that is by the signal, or by exit status 1 where it comes during
    its own imports, site and runpy: then nothing of ours is in the traceback.
    """
    starting = "KeyboardInterrupt" in errors and f"{REPOSITORY}/tml" not in errors
    return code in (130, -signal.SIGINT) or (code == 1 and starting)
