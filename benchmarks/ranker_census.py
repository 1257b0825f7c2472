"""How good the Heavy Ranker is on UCI Census-Income, both tasks in one model: prepare, train,
measure, by the commands that a user types.

    python benchmarks/ranker_census.py --data DIR [--seeds 1 2 3] [--hold-out 0.2] [--set a.b=value]

DIR holds train.csv.gz and test.csv.gz. Prints a JSON line for each task and seed, then one for each
task over the seeds. The bar is an AUC of .952 and .9945 on test, the aim what LightGBM reaches.
With --hold-out, settings are tried: so large a share of the training rows is measured on, drawn by
hash, and test is not looked at.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECAP = ROOT / "projects/home/recap"
TRAIN = RECAP / "config/census_income.yaml"
BARS = {"income": 0.952, "never_married": 0.9945}
LIGHTGBM = {"income": 0.958, "never_married": 0.9949}
MMOE = {"income": 0.9447, "never_married": 0.9932}
"""Published."""
SHOWN = ("auc", "rce", "calibration", "pr_auc", "log_loss")


def say(**record: Any) -> None:
    """One JSON line."""
    print(json.dumps(record), flush=True)


def call(command: Sequence[str | Path]) -> None:
    """Run a command; ends the program with what it said where it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\nfailed: {' '.join(map(str, command))}")


def prepare(data: Path, folder: Path, hold_out: float | None) -> None:
    """Make the files."""
    config = RECAP / "config/prepare/census_income.yaml"
    command: list[str | Path] = [sys.executable, RECAP / "prepare.py", f"--config={config}"]
    command += [f"--output={folder}"]
    command += [f"--input={name}={data / name}.csv.gz" for name in ("train", "test")]
    call([*command, *([f"--set=split.hold_out.share={hold_out}"] if hold_out else [])])


def train(prepared: Path, measured: str, run: Path, seed: int, sets: list[str]) -> dict[str, Any]:
    """Train and evaluate; returns task → metrics."""
    settings = [
        f"train_data.inputs={prepared}/train/*.parquet",
        f"train_data.feature_spec={prepared}/spec.yaml",
        f"validation_data.test.inputs={prepared}/{measured}/*.parquet",
        f"validation_data.test.feature_spec={prepared}/spec.yaml",
        f"training.seed={seed}",
        *sets,
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1"]
    command: list[str | Path] = [*torchrun, "--nproc_per_node=1", RECAP / "main.py"]
    command += [f"--config_path={TRAIN}"]
    call([*command, f"--save_dir={run}", *[f"--set={one}" for one in settings]])
    report = json.loads((run / "metrics.json").read_text())
    return dict(report["partitions"]["test"]["tasks"])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the two files")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument(
        "--hold-out", type=float, help="share of the training rows to measure on, in place of test"
    )
    parser.add_argument("--set", action="append", default=[], help="change the ranker's config")
    parser.add_argument("--output", type=Path, help="keep the files and the runs in this folder")
    arguments = parser.parse_args()
    measured = "validation" if arguments.hold_out is None else "held_out"
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.output or Path(temporary)).absolute()
        start = time.monotonic()
        prepare(arguments.data.absolute(), folder / "prepared", arguments.hold_out)
        say(what="prepare", seconds=round(time.monotonic() - start, 1))
        found: dict[str, list[float]] = {}
        for seed in arguments.seeds:
            start = time.monotonic()
            run = folder / f"run-{seed}"
            tasks = train(folder / "prepared", measured, run, seed, arguments.set)
            seconds = round(time.monotonic() - start, 1)
            for task, values in tasks.items():
                found.setdefault(task, []).append(values["auc"])
                numbers = {name: round(values[name], 4) for name in SHOWN}
                over = {"over_bar": BARS[task], "over_lightgbm": LIGHTGBM[task]}
                over |= {"over_published_mmoe": MMOE[task]}
                gaps = {name: round(values["auc"] - floor, 4) for name, floor in over.items()}
                rows = "test" if arguments.hold_out is None else "held out"
                say(task=task, seed=seed, rows=rows, seconds=seconds, **numbers, **gaps)
        for task, aucs in found.items():
            mean, deviation = statistics.mean(aucs), statistics.pstdev(aucs)
            say(
                task=task,
                num_seeds=len(aucs),
                mean_auc=round(mean, 4),
                auc_deviation=round(deviation, 5),
            )


if __name__ == "__main__":
    main()
