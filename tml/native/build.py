"""Compile the C files of this folder into one library, named by the hash of what it is made of.

    python tml/native/build.py FOLDER        puts it there and prints its path; exit 1: it cannot be

Standard library only and no import of tml: the image and scripts/setup_venv.sh run this file as it
stands. `tml.native.library` looks for the same name.
"""

import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-fPIC", "-shared")
"""Nothing here asks for this machine's processor: crew.h says how newer ones are used."""
COMPILERS = ("cc", "gcc", "clang")
PATIENCE_S = 120.0
"""It takes a second or two; a compiler that hangs must not hold up training."""


class CompileError(Exception):
    """There is no library; the message says why, in a few words, and `details` what was said."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


def sources() -> list[Path]:
    """The C files, headers included."""
    return sorted([*HERE.glob("*.c"), *HERE.glob("*.h")])


def library_name() -> str:
    """The name of the library that the C files, the flags and this kind of processor make."""
    digest = hashlib.sha256(" ".join((*FLAGS, platform.machine(), sys.platform)).encode())
    for source in sources():
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return f"kernels-{digest.hexdigest()[:16]}.so"


def find_compiler() -> str | None:
    """The path of a C compiler."""
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def compile_into(folder: Path) -> Path:
    """Compile into `folder`, under its own name when it is whole."""
    compiler = find_compiler()
    if compiler is None:
        raise CompileError(f"no C compiler found ({', '.join(COMPILERS)})")
    target = folder / library_name()
    part = folder / f".{target.name}.{os.getpid()}"
    files = [str(source) for source in sources() if source.suffix == ".c"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        status, said = _run([compiler, *FLAGS, *files, "-o", str(part), "-lm"])
        if status or not part.exists():
            raise CompileError(f"{compiler} failed with status {status}", said)
        with part.open("rb") as made:
            os.fsync(made.fileno())  # a cut library would kill the process that loads it
        part.replace(target)
    except OSError as error:
        raise CompileError(f"{compiler} could not make {target}: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return target


def _run(command: list[str]) -> tuple[int, str]:
    """Exit status of a compiler, and what it said."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            _, said = process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
            process.communicate()
            raise CompileError(f"{command[0]} had not ended after {PATIENCE_S:.0f} s") from None
    return process.returncode, said


def main() -> int:
    """The command line."""
    if len(sys.argv) != 2:
        print("usage: build.py FOLDER", file=sys.stderr)
        return 2
    target = Path(sys.argv[1]) / library_name()
    try:
        if not target.exists():
            target = compile_into(target.parent)
    except CompileError as error:
        print(f"no compiled kernels: {error}\n{error.details}".rstrip(), file=sys.stderr)
        return 1
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
