"""How near the Heavy Ranker comes to the best possible, in a world whose probabilities are known.

    python benchmarks/ranker_planted.py [--seeds 1 2 3] [--set a.b=value]

A seed is that of the world and of the training. Runs main.py on config/planted.yaml, the rows
generated within the run, and prints a JSON line for each task and seed. The bar: AUC and RCE at
least .97 of those of the true probabilities on the same rows, calibration within 2 %.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECAP = ROOT / "projects/home/recap"
LEAST_RATIO, MOST_OFF = 0.97, 0.02


def train(folder: Path, seed: int, sets: list[str]) -> dict[str, Any]:
    """Generate, train and evaluate; returns the report of the partition."""
    settings = [
        f"planted.seed={seed}",
        f"training.seed={seed}",
        f"train_data.inputs={folder}/rows/train/*.parquet",
        f"train_data.feature_spec={folder}/rows/spec.yaml",
        f"validation_data.validation.inputs={folder}/rows/validation/*.parquet",
        f"validation_data.validation.feature_spec={folder}/rows/spec.yaml",
        *sets,
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1"]
    command = [*torchrun, "--nproc_per_node=1", RECAP / "main.py"]
    command += [f"--config_path={RECAP}/config/planted.yaml", f"--save_dir={folder}/run"]
    command += [f"--set={one}" for one in settings]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\nfailed: {' '.join(map(str, command))}")
    report = json.loads((folder / "run/metrics.json").read_text())
    return dict(report["partitions"]["validation"])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--set", action="append", default=[], help="change the config")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            report = train(Path(folder), seed, arguments.set)
            seconds = round(time.monotonic() - start, 1)
        for task, values in report["tasks"].items():
            best = report["best"][task]
            ratios = {name: values[name] / best[name] for name in ("auc", "rce")}
            off = abs(values["calibration"] - 1)
            record = {
                "task": task,
                "seed": seed,
                "seconds": seconds,
                **{name: round(values[name], 4) for name in ("auc", "rce", "calibration")},
                **{f"best_{name}": round(best[name], 4) for name in ratios},
                **{f"{name}_ratio": round(ratio, 4) for name, ratio in ratios.items()},
                "reached": min(ratios.values()) >= LEAST_RATIO and off <= MOST_OFF,
            }
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
