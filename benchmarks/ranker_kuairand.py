"""How good the Heavy Ranker is on KuaiRand-Pure: prepare, train TwHIN, train the ranker,
measure, by the commands that a user types.

    python benchmarks/ranker_kuairand.py --data DIR [--train-until 2022-05-04]
        [--validation 2022-05-05 2022-05-06] [--seeds 1 2 3] [--no-twhin] [--lightgbm]

DIR holds exposures_0425_0506.csv.gz, users.csv.gz, videos.csv.gz, history_edges.tsv.gz and
video_edges.tsv.gz; other exposures are named with --exposures. Prints one JSON line a result.
`floor` is LightGBM's AUC of 5 and 6 May, trained until 4 May; other days have none. --lightgbm
trains LightGBM on the columns that prepare made, in an environment of its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from projects.home.recap.config import RecapConfig
from tml.config import load_config

ROOT = Path(__file__).resolve().parents[1]
RECAP = ROOT / "projects/home/recap"
PREPARE = RECAP / "config/prepare/kuairand.yaml"
TRAIN = RECAP / "config/kuairand.yaml"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1"]
TORCHRUN += ["--nproc_per_node=1"]
TWHIN_RELATIONS: tuple[str, ...] = (
    "long_view=user:video",
    "like=user:video",
    "by_author=video:author",
)
TWHIN_RELATIONS += ("has_tag=video:tag",)
FLOORS = {"is_click": 0.7446, "long_view": 0.7478, "is_like": 0.8546, "is_profile_enter": 0.7626}
FLOOR_DAYS = ("2022-05-04", ["2022-05-05", "2022-05-06"])
NO_LIGHTGBM = (
    "lightgbm cannot be imported; it is no part of this project: python -m venv /tmp/lightgbm && "
    "/tmp/lightgbm/bin/pip install lightgbm scikit-learn polars pyyaml, then give "
    "--lightgbm-python /tmp/lightgbm/bin/python"
)
LIGHTGBM = """
import json, sys, time
import lightgbm, numpy, polars
from sklearn.metrics import roc_auc_score
folder, spec = sys.argv[1], json.loads(sys.argv[2])
columns = spec["columns"]
rows = {s: polars.read_parquet(f"{folder}/{s}/*.parquet") for s in ("train", "validation")}
x = {s: rows[s].select(columns).cast(polars.Float32).to_numpy() for s in rows}
for task, column in spec["labels"].items():
    start, y = time.time(), {s: rows[s][column].to_numpy() for s in rows}
    frequent = y["train"].mean() > 0.1
    model = lightgbm.LGBMClassifier(
        n_estimators=200 if frequent else 100, learning_rate=0.05 if frequent else 0.04,
        num_leaves=63 if frequent else 15, min_child_samples=100, subsample=0.8,
        subsample_freq=1, colsample_bytree=0.5, reg_lambda=5, n_jobs=2, verbose=-1)
    model.fit(x["train"], y["train"])
    p = model.predict_proba(x["validation"])[:, 1]
    auc, calibration = roc_auc_score(y["validation"], p), p.sum() / y["validation"].sum()
    found = {"task": task, "auc": auc, "calibration": calibration, "seconds": time.time() - start}
    print(json.dumps(found))
"""
"""Run by --lightgbm-python, in an environment of its own."""


def say(**record: Any) -> None:
    """One JSON line."""
    print(json.dumps(record), flush=True)


def rounded(values: Mapping[str, float], digits: int = 4) -> dict[str, float]:
    """The same, shorter."""
    return {name: round(value, digits) for name, value in values.items()}


def call(command: Sequence[str | Path]) -> str:
    """What a command printed; ends the program with what it said where it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\nfailed: {' '.join(map(str, command))}")
    return done.stdout


def prepare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make the files; returns the summary of `prepare --json`."""
    data = arguments.data
    first, last = arguments.validation
    tables = {
        "exposures": arguments.exposures or data / "exposures_0425_0506.csv.gz",
        "users": data / "users.csv.gz",
        "videos": data / "videos.csv.gz",
        "history": data / "history_edges.tsv.gz",
    }
    inputs = [f"--input={name}={path}" for name, path in tables.items()]
    days = [
        f"--set=split.by_time.train_until={arguments.train_until}",
        f"--set=split.by_time.validation=[{first}, {last}]",
    ]
    command: list[str | Path] = [
        sys.executable,
        RECAP / "prepare.py",
        f"--config={PREPARE}",
        *inputs,
        *days,
    ]
    summary: dict[str, Any] = json.loads(call([*command, f"--output={folder}", "--json"]))
    return summary


def train_twhin(data: Path, folder: Path) -> list[str]:
    """Vectors of users and videos from their history, all before the first exposure; returns the
    ranker's settings that look them up by id.
    """
    folder.mkdir(parents=True)
    edges = []
    for name in ("history_edges", "video_edges"):
        # Vectors are looked up by the ids of the rows, which are 12 where these files write u12.
        table = pl.read_csv(data / f"{name}.tsv.gz", separator="\t", has_header=False)
        left, _, right = table.columns
        table = table.with_columns(pl.col(left, right).str.strip_chars_start("uv"))
        edges.append(folder / f"{name}.tsv")
        table.write_csv(edges[-1], separator="\t", include_header=False)
    relations = [f"--relation={name}" for name in TWHIN_RELATIONS]
    twhin, graph = ROOT / "projects/twhin", folder / "graph"
    call(
        [
            sys.executable,
            twhin / "prepare.py",
            "--train",
            *edges,
            *relations,
            "--drop-other-relations",
            f"--output={graph}",
        ]
    )
    call(
        [
            *TORCHRUN,
            twhin / "run.py",
            f"--config_yaml_path={twhin}/config/user_item.yaml",
            f"--graph={graph}",
            f"--save_dir={folder}/run",
        ]
    )
    tables = ", ".join(
        f"{{name: {name}_twhin, path: {folder}/run/vectors/{name}.parquet, by: {name}_id}}"
        for name in ("user", "video")
    )
    places = ("train_data", "validation_data.validation")
    return [f"{place}.vector_tables=[{tables}]" for place in places]


def train(prepared: Path, run: Path, seed: int, num_rows: int, sets: list[str]) -> dict[str, Any]:
    """Train and evaluate; returns the report of the partition `validation`."""
    config = load_config(RecapConfig, TRAIN, sets)
    assert config.training.num_epochs is not None
    steps = config.training.num_epochs * num_rows // config.train_data.global_batch_size
    # The cosine ends where the run ends, however many days there are.
    cosine = "optimizer.single_task_learning_rate.linear_ramp_to_cosine.final_num_steps"
    settings = [
        f"train_data.inputs={prepared}/train/*.parquet",
        f"train_data.feature_spec={prepared}/spec.yaml",
        f"validation_data.validation.inputs={prepared}/validation/*.parquet",
        f"validation_data.validation.feature_spec={prepared}/spec.yaml",
        f"{cosine}={steps}",
        f"training.seed={seed}",
        *sets,
    ]
    command: list[str | Path] = [*TORCHRUN, RECAP / "main.py", f"--config_path={TRAIN}"]
    call([*command, f"--save_dir={run}", *[f"--set={one}" for one in settings]])
    report: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return dict(report["partitions"]["validation"])


def report_run(report: dict[str, Any], seed: int, seconds: float, floors: dict[str, float]) -> None:
    """One line a seed: AUC by task against the floor, calibration (Σp/Σy) as the model gives it and
    after Platt's map, out of fold.
    """
    auc = {task: values["auc"] for task, values in report["tasks"].items()}
    calibrated = report["out_of_fold"]["tasks"]
    over = {task: auc[task] - floor for task, floor in floors.items() if task in auc}
    say(
        what="ranker",
        seed=seed,
        seconds=round(seconds, 1),
        mean_auc=round(statistics.mean(auc.values()), 4),
        auc=rounded(auc),
        over_floor=rounded(over),
        calibration_raw=rounded(
            {task: values["calibration"] for task, values in report["tasks"].items()}, 3
        ),
        calibration_out_of_fold=rounded(
            {task: values["calibration"] for task, values in calibrated.items()}, 3
        ),
        auc_out_of_fold=rounded({task: values["auc"] for task, values in calibrated.items()}),
    )


def report_seeds(reports: Sequence[dict[str, Any]]) -> None:
    """Mean and standard deviation over the seeds."""
    tasks = reports[0]["tasks"]
    found = {task: [one["tasks"][task]["auc"] for one in reports] for task in tasks}
    means = [statistics.mean(values) for values in zip(*found.values(), strict=True)]
    say(
        what="ranker over seeds",
        num_seeds=len(reports),
        mean_auc=round(statistics.mean(means), 4),
        mean_auc_deviation=round(statistics.pstdev(means), 4),
        auc=rounded({task: statistics.mean(values) for task, values in found.items()}),
        auc_deviation=rounded({task: statistics.pstdev(values) for task, values in found.items()}),
    )


def report_lightgbm(prepared: Path, python: str, floors: dict[str, float]) -> None:
    """LightGBM, a model a task, on the columns that prepare made, ids left out."""
    if subprocess.run(
        [python, "-c", "import lightgbm, sklearn, polars"], capture_output=True
    ).returncode:
        say(what="lightgbm", left_out=NO_LIGHTGBM)
        return
    spec = yaml.safe_load((prepared / "spec.yaml").read_text())
    categorical = [
        one["column"] for name, one in spec["categorical"].items() if not name.endswith("_id")
    ]
    columns = [*spec["continuous"], *spec["binary"], *categorical]
    wanted = json.dumps({"columns": columns, "labels": spec["labels"]})
    lines = call([python, "-c", LIGHTGBM, prepared, wanted]).splitlines()
    results = [json.loads(line) for line in lines if line.startswith("{")]
    auc = {one["task"]: one["auc"] for one in results}
    say(
        what="lightgbm",
        seconds=round(sum(one["seconds"] for one in results), 1),
        mean_auc=round(statistics.mean(auc.values()), 4),
        auc=rounded(auc),
        over_floor=rounded({task: auc[task] - floor for task, floor in floors.items()}),
        calibration_raw=rounded({one["task"]: one["calibration"] for one in results}, 3),
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the KuaiRand files")
    parser.add_argument("--exposures", type=Path, help="CSV of exposures in place of the folder's")
    parser.add_argument("--train-until", default=FLOOR_DAYS[0], help="last day of training")
    parser.add_argument(
        "--validation", nargs=2, default=FLOOR_DAYS[1], metavar="DAY", help="first and last day"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--lightgbm", action="store_true", help="train LightGBM too, to compare")
    parser.add_argument("--lightgbm-python", default=sys.executable, help="Python that has it")
    parser.add_argument("--no-twhin", action="store_true", help="leave TwHIN's vectors out")
    parser.add_argument("--set", action="append", default=[], help="change the ranker's config")
    parser.add_argument("--output", type=Path, help="keep the files and the runs in this folder")
    arguments = parser.parse_args()
    arguments.data = arguments.data.absolute()  # commands run in the root of the repository
    if arguments.exposures is not None:
        arguments.exposures = arguments.exposures.absolute()
    usual = (arguments.train_until, list(arguments.validation)) == FLOOR_DAYS
    floors = FLOORS if usual and arguments.exposures is None else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.output or Path(temporary)).absolute()
        start = time.monotonic()
        summary = prepare(arguments, folder / "prepared")
        say(
            what="prepare",
            seconds=round(time.monotonic() - start, 1),
            **{key: summary[key] for key in ("rows", "positives")},
        )
        sets = arguments.set
        if not arguments.no_twhin:
            start = time.monotonic()
            sets = [*train_twhin(arguments.data, folder / "twhin"), *sets]
            say(what="twhin", seconds=round(time.monotonic() - start, 1))
        reports = []
        for seed in arguments.seeds:
            start = time.monotonic()
            run = folder / f"run-{seed}"
            reports.append(train(folder / "prepared", run, seed, summary["rows"]["train"], sets))
            report_run(reports[-1], seed, time.monotonic() - start, floors)
        if len(reports) > 1:
            report_seeds(reports)
        if arguments.lightgbm:
            report_lightgbm(folder / "prepared", arguments.lightgbm_python, floors)


if __name__ == "__main__":
    main()
