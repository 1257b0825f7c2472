"""What the launcher costs over the same `docker run` typed by hand: whole processes, in turns.

    .venv/bin/python benchmarks/launcher_overhead.py [--turns 20]

The typed line is the launcher's own `--dry-run`, run by bash; both run a project whose script is
`true`, in a checkout made for this. Prints a JSON line per turn and one of medians, in seconds.
Needs an engine and the image.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and exit with 1 where the launcher costs more than it may."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--limit-s", type=float, default=0.5, help="largest allowed difference")
    flags = parser.parse_args(argv)
    launcher = [sys.executable, "-m", "tml.docker"]
    subprocess.run([*launcher, "build"], cwd=REPOSITORY, check=True)
    with tempfile.TemporaryDirectory() as folder:
        env = make_checkout(Path(folder))
        run = [*launcher, "run", "nothing"]
        shown = [*run, "--dry-run"]
        line = subprocess.run(shown, env=env, capture_output=True, text=True, check=True).stdout
        typed_s, launched_s = [], []
        typed_cpu_s, launched_cpu_s = [], []
        for turn in range(flags.turns):
            for argv, wall_s, cpu_s in (
                (["bash", "-c", f"exec {line}"], typed_s, typed_cpu_s),
                (run, launched_s, launched_cpu_s),
            ):
                wall, cpu = seconds(argv, env)
                wall_s.append(wall)
                cpu_s.append(cpu)
            print(json.dumps({"turn": turn, "typed_s": typed_s[-1], "launcher_s": launched_s[-1]}))
    typed, launched = statistics.median(typed_s), statistics.median(launched_s)
    summary = {
        "turns": flags.turns,
        "median_typed_s": round(typed, 3),
        "median_launcher_s": round(launched, 3),
        "difference_s": round(launched - typed, 3),
        "ratio": round(launched / typed, 2),
        "median_typed_cpu_s": round(statistics.median(typed_cpu_s), 3),
        "median_launcher_cpu_s": round(statistics.median(launched_cpu_s), 3),
    }
    print(json.dumps(summary))
    return 0 if launched - typed <= flags.limit_s else 1


def make_checkout(folder: Path) -> dict[str, str]:
    """A checkout with the real image's inputs and a project that does nothing; the environment that
    uses it.
    """
    base, home = folder / "checkout", folder / "home"
    scripts = base / "projects" / "nothing" / "scripts"
    scripts.mkdir(parents=True)
    (scripts / "run_in_docker.sh").write_text("true\n")
    shutil.copy(REPOSITORY / "Dockerfile", base)
    shutil.copytree(REPOSITORY / "requirements", base / "requirements")
    for name in (".config", "tmp"):
        (home / name).mkdir(parents=True)
    paths = {"TML_BASE": str(base), "HOME": str(home), "PYTHONPATH": str(REPOSITORY)}
    return {**os.environ, **paths}


def seconds(argv: Sequence[str], env: dict[str, str]) -> tuple[float, float]:
    """Wall and processor time of a whole process, which must succeed."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=True
    )
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return round(wall, 4), round(cpu, 4)


if __name__ == "__main__":
    sys.exit(main())
