"""Secrets on their way into a container: a file in this machine's memory, mounted, and read by bash
inside (BASH_ENV). Once the container runs the file is gone from here, and is seen only through the
container's own mount.

What a container is created with, its environment, command and labels, is shown to everybody who may
speak to the engine, and is kept on disk by it. So the values are in none of these.
"""

import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from tml.docker import records
from tml.docker.errors import LauncherError
from tml.docker.plan import Plan, Variable
from tml.machines import environment

FILE = "/run/secrets/tml.env"
"""In the container; BASH_ENV says so."""
PREFIX = "tml-secrets-"
MEMORY = Path("/dev/shm")


def stage(plan: Plan, env: Mapping[str, str] = os.environ) -> Path | None:
    """Write the secrets of a plan to a file that is to be mounted at FILE; None where there are
    none. Only the caller can reach it here; in the container, whoever runs there can read it.
    """
    secret = [variable for variable in plan.env if variable.secret]
    if not secret:
        return None
    folder = _make_folder(plan, env)
    file = folder / Path(FILE).name
    try:
        file.touch(mode=0o600, exist_ok=False)
        file.write_bytes(_script(secret))
        # The container's user may be any; the folder's mode, 0700, keeps others here away.
        file.chmod(0o444)
    except BaseException as error:
        discard(file)
        if isinstance(error, OSError):
            raise LauncherError(
                f"cannot write the secrets to {file}: {error.strerror}; free some space there"
            ) from error
        raise
    return file


def discard(file: Path | None) -> None:
    """Remove what `stage` made; a container that has started keeps it."""
    if file is not None:
        shutil.rmtree(file.parent, ignore_errors=True)


def values_in(script: bytes) -> list[str]:
    """The secrets in a file that `stage` wrote."""
    words = shlex.split(os.fsdecode(script))
    return [word.partition("=")[2] for before, word in pairwise(words) if before == "export"]


def is_read_by(command: Sequence[str]) -> bool:
    """Whether a container's command reads BASH_ENV by itself: a script of bash, not a shell that is
    typed at, and not another program.
    """
    return len(command) > 1 and command[0] == "bash" and not command[1].startswith("-")


def are_in(env: Sequence[str]) -> bool:
    """Whether a container with this environment, as the engine tells it, was given secrets."""
    return f"{environment.BASH_ENV}={FILE}" in env


def wrapped(command: Sequence[str]) -> list[str]:
    """The command in a bash that reads the secrets and then is the command."""
    return ["bash", "-c", 'exec "$@"', "tml", *command]


def leftovers(env: Mapping[str, str] = os.environ) -> list[Path]:
    """Folders of the caller's that a dead launcher left behind, with secrets in them."""
    found = []
    for place in {*_places(True, env), *_places(False, env)}:
        for folder in place.glob(f"{PREFIX}*"):
            try:
                ours = folder.stat().st_uid == os.getuid()
            except OSError:
                continue
            if ours and not _is_alive(folder.name.removeprefix(PREFIX).split("-")[1:2]):
                found.append(folder)
    return sorted(found)


def _make_folder(plan: Plan, env: Mapping[str, str]) -> Path:
    refusals = []
    for place in _places(plan.shares_memory, env):
        try:
            if not plan.shares_memory:
                place.mkdir(mode=0o700, parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix=f"{PREFIX}{plan.run_id}-{os.getpid()}-", dir=place))
        except OSError as error:
            refusals.append(f"{place} ({error.strerror})")
    raise LauncherError(
        f"there is no place for the secrets that --env names; tried {', '.join(refusals)}. Make "
        "one of these writable"
    )


def _places(shares_memory: bool, env: Mapping[str, str]) -> list[Path]:
    """Where secrets may lie, the best first: in memory, where the engine sees that."""
    if not shares_memory or sys.platform != "linux":
        return [records.folder(env).parent]
    runtime = env.get(environment.XDG_RUNTIME_DIR)
    return [MEMORY, *([Path(runtime)] if runtime else []), Path(tempfile.gettempdir())]


def _script(secret: Sequence[Variable]) -> bytes:
    lines = [f"export {variable.name}={shlex.quote(variable.value)}" for variable in secret]
    # What bash starts has them now; it need not read them again, over what a script has set since.
    lines.append(f"unset {environment.BASH_ENV}")
    return os.fsencode("\n".join([*lines, ""]))


def _is_alive(pid: Sequence[str]) -> bool:
    if not (pid and pid[0].isdigit()):
        return True  # Not a name of ours: not ours to remove.
    try:
        os.kill(int(pid[0]), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True
