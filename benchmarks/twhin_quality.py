"""How good TwHIN's vectors are on public graphs: prepare, train with the shipped config,
measure, by the commands that a user types.

    python benchmarks/twhin_quality.py fb15k237_complex --data DIR [--seeds 1 2 3] [--work FOLDER]
    python benchmarks/twhin_quality.py kuairand --data DIR --relations long_view like
    python benchmarks/twhin_quality.py gowalla --data DIR --validate

Names are those of CASES. DIR holds the published files (train, valid, test as TSV or adjacency
lines, gzip). Prints one JSON line a seed, and one with the mean over seeds and the bar. --validate
measures on validation edges in place of test edges, for choosing settings: those of the data, or
where it has none a tenth of its training edges. --relations leaves out all others of KuaiRand.
--config tries another YAML.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TWHIN = Path(__file__).resolve().parents[1] / "projects/twhin"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1"]
TORCHRUN += ["--nproc_per_node=1"]
KUAIRAND_RELATIONS = (
    "long_view=user:video",
    "like=user:video",
    "by_author=video:author",
    "has_tag=video:tag",
)
KNOWLEDGE_GRAPH = ("--entity-type", "entity")
HELD_OUT = ("--split", "0.9,0.1,0")


@dataclass(frozen=True)
class Case:
    """One line of the table in RESULTS.md."""

    config: str
    """Below projects/twhin/config."""
    files: dict[str, Sequence[str]]
    """Split → files, below --data."""
    prepare: Sequence[str]
    """Flags of prepare.py."""
    metric: tuple[str, ...]
    """Where it stands in the report of a split."""
    bar: float
    aim: float


def knowledge_graph(config: str, bar: float, aim: float) -> Case:
    """Filtered MRR over both sides of the test edges."""
    files = {split: [f"{split}.tsv.gz"] for split in ("train", "valid", "test")}
    metric = ("link_prediction", "mean", "mrr")
    return Case(config, files, KNOWLEDGE_GRAPH, metric, bar, aim)


RECALL = "recall@20"
CASES = {
    "fb15k237_complex": knowledge_graph("fb15k237_complex", 0.350, 0.365),
    "fb15k237_transe": knowledge_graph("fb15k237_transe", 0.300, 0.313),
    "wn18rr_complex": knowledge_graph("wn18rr_complex", 0.460, 0.480),
    "codex_s_complex": knowledge_graph("codex_s_complex", 0.460, 0.465),
    "gowalla": Case(
        "gowalla",
        {"train": ["train.txt.gz"], "test": ["test.txt.gz"]},
        ("--format", "adjacency", "--relation", "interact=user:item"),
        ("retrieval", "relations", "interact", RECALL),
        0.175,
        0.1837,
    ),
    "kuairand": Case(
        "kuairand",
        {
            "train": ["history_edges.tsv.gz", "video_edges.tsv.gz"],
            "test": ["future_edges_0425_0506.tsv.gz"],
        },
        ("--drop-other-relations",),
        ("retrieval", "relations", "long_view", RECALL),
        0.120,
        0.130,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--data", type=Path, required=True, help="folder of the published files")
    parser.add_argument("--work", type=Path, help="folder for graph and runs; default: temporary")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--config", type=Path, help="default: the shipped one")
    parser.add_argument("--relations", nargs="+", help="KuaiRand's relations that are trained")
    parser.add_argument("--validate", action="store_true", help="measure on validation edges")
    parser.add_argument("--set", action="append", default=[], help="of run.py; repeatable")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="twhin_quality_") as temporary:
        work = arguments.work or Path(temporary)
        measured = [measure(arguments, seed, work) for seed in arguments.seeds]
    case = CASES[arguments.case]
    say(
        case=arguments.case,
        seeds=arguments.seeds,
        split="validation" if arguments.validate else "test",
        mean=round(statistics.fmean(measured), 4),
        bar=case.bar,
        aim=case.aim,
        reached=statistics.fmean(measured) >= case.bar,
    )
    return 0


def measure(arguments: argparse.Namespace, seed: int, work: Path) -> float:
    """Prepare where that is missing, train and measure; says the result and returns the metric."""
    case = CASES[arguments.case]
    relations = arguments.relations if arguments.case == "kuairand" else None
    flags, what = prepare_flags(case, arguments.data, relations, validate=arguments.validate)
    graph = work / "-".join(["graph", *what])
    if not graph.exists():
        call("prepare", *flags, "--output", graph)
    save_dir = work / f"run-{seed}"
    config = arguments.config or TWHIN / f"config/{case.config}.yaml"
    command = [*TORCHRUN, TWHIN / "run.py", f"--config_yaml_path={config}", f"--graph={graph}"]
    command += [f"--save_dir={save_dir}", "--overwrite_save_dir", "--set", f"training.seed={seed}"]
    for setting in arguments.set:
        command += ["--set", setting]
    if relations is not None:
        asked = ",".join(name for name in relations if name in ("long_view", "like"))
        command += ["--set", f"evaluation.relations=[{asked}]"]
    if arguments.validate:
        command += ["--no_evaluation"]
    start = time.monotonic()
    run(command)
    minutes = (time.monotonic() - start) / 60
    if arguments.validate:
        flags = [f"--run={save_dir}", "--split=validation", "--json"]
        if (save_dir / "evaluation/best.json").exists():
            flags.append("--step=best")
        report = json.loads(call("evaluate", *flags, capture=True))
    else:
        report = json.loads((save_dir / "metrics.json").read_text())
    found = report
    for name in case.metric:
        found = found[name]
    value = float(found)  # type: ignore[arg-type]
    say(
        case=arguments.case,
        relations=relations,
        seed=seed,
        split="validation" if arguments.validate else "test",
        metric="/".join(case.metric),
        value=round(value, 4),
        more=more(report),
        step=report.get("best_step", report.get("step")),
        minutes_training_and_evaluation=round(minutes, 1),
        load=round(os.getloadavg()[0], 1),
    )
    return value


def say(**record: Any) -> None:
    """One JSON line."""
    print(json.dumps(record), flush=True)


def prepare_flags(
    case: Case, data: Path, relations: Sequence[str] | None, *, validate: bool
) -> tuple[list[Any], list[str]]:
    """Flags of prepare.py, and what tells this preparation from others of the data."""
    flags: list[Any] = list(case.prepare)
    files = dict(case.files)
    what = [case.config.partition("_")[0]]
    if case.config == "kuairand":
        wanted = [one for one in KUAIRAND_RELATIONS if _is_wanted(one, relations)]
        for one in wanted:
            flags += ["--relation", one]
        what += [one.partition("=")[0] for one in wanted]
    if validate and "valid" not in files:
        del files["test"]
        flags += HELD_OUT
        what.append("held-out")
    for split, names in files.items():
        flags += [f"--{split}", *(data / name for name in names)]
    return flags, what


def more(report: dict[str, Any]) -> dict[str, float]:
    """Other metrics of the report that published tables have."""
    shown = {}
    for kind, names in (
        ("link_prediction", ("mrr", "hits@1", "hits@3", "hits@10")),
        ("retrieval", ("recall@20", "ndcg@20", "hit@20")),
    ):
        if kind in report:
            mean = report[kind]["mean"]
            shown |= {name: round(mean[name], 4) for name in names if name in mean}
    return shown


def call(program: str, *flags: Any, capture: bool = False) -> str:
    """Run one of TwHIN's programs; its output."""
    return run([sys.executable, TWHIN / f"{program}.py", *flags], capture=capture)


def run(command: Sequence[Any], *, capture: bool = False) -> str:
    """Run a command, its output on this one's standard error unless captured."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE if capture else sys.stderr,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode} of: {' '.join(map(str, command))}")
    return done.stdout or ""


def _is_wanted(relation: str, wanted: Sequence[str] | None) -> bool:
    return wanted is None or relation.partition("=")[0] in wanted


if __name__ == "__main__":
    sys.exit(main())
