"""What the launcher costs: whole processes, in turns with what does the same without it.

    .venv/bin/python benchmarks/launcher_overhead.py [--turns 20] [--part run up stop]

run:  a container that does nothing. The launcher's `run`; its own `--dry-run` line typed to bash;
      TorchX 0.7 `local_docker` for the same container.
up:   three containers that make one training step together (torchrun, gloo, a small model). The
      launcher's `up`; its own `--dry-run` lines typed to bash; TorchX `dist.ddp -j 3x1`. Stamps
      written inside the containers tell the launcher's share from torchrun's and torch's; what
      these import, and nothing else, is measured beside them: the limit.
stop: an idle detached job, from the command to nothing being left.

All of them run in a checkout made for this. TorchX is installed from the package index into DIR
(default ~/.cache/tml/torchx) where it is missing; `--torchx none` leaves it out. Prints a JSON line
a turn and one of medians a part, in seconds. Needs an engine; builds the image where it is missing.
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
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
LAUNCHER = [sys.executable, "-m", "tml.docker"]
TORCHX = "torchx==0.7.0"
NUM_CONTAINERS = 3

STEP_SCRIPT = """\
date +%s.%N > "/root/tmp/stamps/$(hostname).torchrun"
exec python -m tml.torchrun /usr/src/app/tml/projects/step/step.py
"""
STEP = '''\
"""One training step of a small model on all processes; stamps its end."""
import os, socket, sys, time
from pathlib import Path
import torch
import torch.distributed as dist

stamps = Path(os.environ.get("STAMPS", "/root/tmp/stamps"))
name = f"{socket.gethostname()}.{os.environ['RANK']}"
torch.set_num_threads(1)
dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(torch.ones(32, 64)).mean().backward()
optimizer.step()
(stamps / f"{name}.step").write_text(str(time.time()))
dist.destroy_process_group()
'''


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and exit with 1 where the launcher costs more than it may."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--part", nargs="+", default=["run", "up", "stop"], choices=tuple(PARTS))
    parser.add_argument("--torchx", default=str(Path.home() / ".cache" / "tml" / "torchx"))
    flags = parser.parse_args(argv)
    torchx = None if flags.torchx == "none" else ensure_torchx(Path(flags.torchx))
    subprocess.run([*LAUNCHER, "build"], cwd=REPOSITORY, check=True)
    within = True
    with tempfile.TemporaryDirectory() as folder:
        env = make_checkout(Path(folder))
        for part in flags.part:
            within &= PARTS[part](env, flags.turns, torchx)
    return 0 if within else 1


def measure_run(env: dict[str, str], turns: int, torchx: Path | None) -> bool:
    """The launcher may cost 0.5 s over the typed line."""
    run = [*LAUNCHER, "run", "nothing"]
    ways = {"typed": ["bash", "-c", f"exec {dry_run(run, env)}"], "launcher": run}
    if torchx is not None:
        sh = ["utils.sh", "--image", "local/torch", "true"]
        ways["torchx"] = [*torchx_run(torchx), *sh]
    walls: dict[str, list[float]] = {name: [] for name in ways}
    cpus: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns):
        for name, argv in ways.items():
            wall, cpu = seconds(argv, env)
            walls[name].append(wall)
            cpus[name].append(cpu)
        print_line({"part": "run", "turn": turn, **{f"{n}_s": w[-1] for n, w in walls.items()}})
    difference = statistics.median(walls["launcher"]) - statistics.median(walls["typed"])
    summary: dict[str, Any] = {f"median_{n}_s": median(w) for n, w in walls.items()}
    summary |= {f"median_{n}_cpu_s": median(c) for n, c in cpus.items()}
    summary |= {"difference_s": round(difference, 3), "limit_s": 0.5}
    summary["ratio"] = round(summary["median_launcher_s"] / summary["median_typed_s"], 2)
    print_line({"part": "run", "turns": turns, "load": os.getloadavg()[0], **summary})
    forget_torchx()
    return difference <= 0.5


def measure_up(env: dict[str, str], turns: int, torchx: Path | None) -> bool:
    """From the slowest container's start of torchrun to the first step of all; and the launcher's
    share: from the command to that start, against the same typed lines.
    """
    up = [*LAUNCHER, "up", "step", "--workers", str(NUM_CONTAINERS - 1)]
    stamps = Path(env["HOME"]) / "tmp" / "stamps"
    ways: dict[str, list[str]] = {"typed": [], "launcher": up}
    if torchx is not None:
        script = f"type=bind,src={env['TML_BASE']}/projects/step,dst=/step"
        mounts = f"{script},type=bind,src={stamps},dst=/stamps"
        ddp = ["dist.ddp", "-j", f"{NUM_CONTAINERS}x1", "--image", "local/torch"]
        ddp += ["--mounts", mounts, "--env", "STAMPS=/stamps", "--script", "/step/step.py"]
        ways["torchx"] = [*torchx_run(torchx), *ddp]
    took: dict[str, dict[str, list[float]]] = {name: {} for name in (*ways, "imports_alone")}
    failures = 0
    for turn in range(turns):
        for name, argv in ways.items():
            shutil.rmtree(stamps, ignore_errors=True)
            stamps.mkdir(parents=True)
            stamps.chmod(0o777)
            typed = ["bash", "-ec", dry_run(up, env)] if name == "typed" else argv
            started = time.time()
            try:
                end(typed, env)
            except subprocess.SubprocessError:
                if name != "torchx":
                    raise
                failures += 1  # it hangs now and then, and leaves its containers running
                forget_torchx()
                continue
            for what, value in stamps_of(stamps, started).items():
                took[name].setdefault(what, []).append(value)
            took[name].setdefault("all_s", []).append(time.time() - started)
        took["imports_alone"].setdefault("s", []).append(imports_alone())
        last = {f"{n}_{what}": round(v[-1], 3) for n, t in took.items() for what, v in t.items()}
        print_line({"part": "up", "turn": turn, **last})
    summary = {f"median_{n}_{what}": median(v) for n, t in took.items() for what, v in t.items()}
    if torchx is not None:
        summary["torchx_failures"] = failures
    print_line({"part": "up", "turns": turns, "load": os.getloadavg()[0], **summary, "limit_s": 3})
    forget_torchx()
    return summary["median_launcher_torchrun_to_step_s"] <= 3


def imports_alone() -> float:
    """The limit: in as many processes at once as there are containers, what torchrun imports, and
    then what its rank imports, and nothing else.
    """
    started = time.time()
    for module in ("torch.distributed.run", "torch"):
        importing = [sys.executable, "-c", f"import {module}"]
        processes = [subprocess.Popen(importing) for _ in range(NUM_CONTAINERS)]
        codes = [process.wait() for process in processes]
        assert not any(codes)
    return time.time() - started


def stamps_of(stamps: Path, started: float) -> dict[str, float]:
    """Seconds from the command to the slowest torchrun, and from that to the last first step."""
    steps = [float(path.read_text()) for path in stamps.glob("*.step")]
    assert len(steps) == NUM_CONTAINERS, sorted(stamps.iterdir())
    begun = [float(path.read_text()) for path in stamps.glob("*.torchrun")]
    if not begun:  # TorchX starts torchrun itself
        return {"command_to_step_s": max(steps) - started}
    assert len(begun) == NUM_CONTAINERS, sorted(stamps.iterdir())
    return {
        "command_to_torchrun_s": max(begun) - started,
        "torchrun_to_step_s": max(steps) - max(begun),
        "command_to_step_s": max(steps) - started,
    }


def measure_stop(env: dict[str, str], turns: int, torchx: Path | None) -> bool:
    """Stopping an idle detached job may take 1 s."""
    took = []
    for turn in range(turns):
        up = [*LAUNCHER, "up", "idle", "--workers", str(NUM_CONTAINERS - 1), "--detach"]
        started = subprocess.run(up, env=env, capture_output=True, text=True, check=True)
        name = started.stdout.strip()
        time.sleep(0.5)
        wall, _ = seconds([*LAUNCHER, "stop", name], env)
        left = subprocess.run(
            ["docker", "ps", "-aq", "--filter", f"label=tml.job={name}"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert not left, f"{name}: {left}"
        took.append(wall)
        print_line({"part": "stop", "turn": turn, "stop_s": wall})
    summary = {"median_stop_s": median(took), "largest_stop_s": max(took), "limit_s": 1}
    print_line({"part": "stop", "turns": turns, "load": os.getloadavg()[0], **summary})
    return median(took) <= 1


PARTS: dict[str, Callable[[dict[str, str], int, Path | None], bool]] = {
    "run": measure_run,
    "up": measure_up,
    "stop": measure_stop,
}


def make_checkout(folder: Path) -> dict[str, str]:
    """A checkout with the real image's inputs and three small projects; the environment that uses
    it.
    """
    base, home = folder / "checkout", folder / "home"
    for name, script in (("nothing", "true\n"), ("step", STEP_SCRIPT), ("idle", "sleep 600\n")):
        scripts = base / "projects" / name / "scripts"
        scripts.mkdir(parents=True)
        (scripts / "run_in_docker.sh").write_text(script)
    (base / "projects" / "step" / "step.py").write_text(STEP)
    shutil.copy(REPOSITORY / "Dockerfile", base)
    shutil.copytree(REPOSITORY / "requirements", base / "requirements")
    shutil.copytree(REPOSITORY / "tml", base / "tml", ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".config", "tmp"):
        (home / name).mkdir(parents=True)
    paths = {"TML_BASE": str(base), "HOME": str(home), "PYTHONPATH": str(REPOSITORY)}
    paths["XDG_STATE_HOME"] = str(home / "state")
    return {**os.environ, **paths}


def dry_run(argv: Sequence[str], env: dict[str, str]) -> str:
    """What the launcher says it would do, as lines for bash."""
    shown = [*argv, "--dry-run"]
    return subprocess.run(shown, env=env, capture_output=True, text=True, check=True).stdout


def end(argv: Sequence[str], env: dict[str, str]) -> None:
    """Run to the end, which must be a good one and come within a minute and a half."""
    subprocess.run(
        argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=90, check=True
    )


def seconds(argv: Sequence[str], env: dict[str, str]) -> tuple[float, float]:
    """Wall and processor time of a whole process, which must succeed."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=True
    )
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return round(wall, 4), round(cpu, 4)


def ensure_torchx(folder: Path) -> Path:
    """TorchX in a virtual environment of its own."""
    if not (folder / "bin" / "torchx").exists():
        venv.create(folder, with_pip=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", TORCHX]
        subprocess.run(pip, check=True)
    return folder


def torchx_run(folder: Path) -> list[str]:
    """TorchX's own way to run on the engine, to the end."""
    command = [str(folder / "bin" / "torchx"), "run", "--scheduler", "local_docker"]
    return [*command, "--wait", "--log", "--workspace", ""]


def forget_torchx() -> None:
    """Remove the containers that TorchX left, and say how many they were."""
    label = "label=torchx.pytorch.org/version"
    listing = ["docker", "ps", "-aq", "--filter", label]
    left = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split()
    if left:
        subprocess.run(["docker", "rm", "-f", *left], capture_output=True, check=True)
        print_line({"containers_left_by_torchx": len(left)})
    subprocess.run(["docker", "network", "rm", "torchx"], capture_output=True, check=False)


def median(values: Sequence[float]) -> float:
    """Rounded."""
    return round(statistics.median(values), 3)


def print_line(record: dict[str, Any]) -> None:
    """One JSON line."""
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    sys.exit(main())
