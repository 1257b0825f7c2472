"""The main job as a newcomer has it: one command, in a container, stopped and called again."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tml import checkpoint
from tml.logs import read_records

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(900)]


def is_left(output: str) -> bool:
    """Whether the container that the launcher named in `output` is still there."""
    (name,) = re.findall(r"container (tml-twhin-\w+) from", output)
    listed = subprocess.run(
        ["docker", "ps", "-a", "--format", "{{.Names}}"], capture_output=True, text=True, check=True
    )
    return name in listed.stdout.split()


def launch(home: Path, *arguments: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "HOME": str(home)}
    return subprocess.Popen(
        [sys.executable, "-m", "tml.docker", "run", *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_main_job_stopped_and_called_again_reaches_nine_tenths_of_the_best_possible(
    tmp_path: Path,
) -> None:
    run = tmp_path / "tmp" / "runs" / "twhin"
    first = launch(tmp_path)
    assert first.stdout is not None
    lines = []
    for line in first.stdout:
        lines.append(line)
        if line.startswith("step   200/"):
            first.send_signal(signal.SIGINT)
    assert first.wait(60) == 130, "".join(lines)
    assert any("stopped by signal 15 after step" in line for line in lines), "".join(lines)
    assert "updated by torch" not in "".join(lines)  # the image has no compiler, but the kernels
    (stopped,) = checkpoint.complete_steps(run)
    assert 200 <= stopped < 400
    assert not is_left("".join(lines))

    second = launch(tmp_path)
    output, _ = second.communicate(timeout=800)
    assert second.returncode == 0, output[-3000:]
    assert f"resuming /root/tmp/runs/twhin at step {stopped}" in output
    assert "link prediction" in output
    report = json.loads((run / "metrics.json").read_text())
    found, best = (report[name]["mean"]["mrr"] for name in ("link_prediction", "planted"))
    assert 0.9 <= found / best <= 1.05
    steps = [r["step"] for r in read_records(run / "metrics.jsonl") if r["kind"] == "train"]
    assert steps == [*range(100, 1700, 100), 1624]
    assert (run / "vectors" / "user.parquet").exists()
    assert not is_left(output)


def test_two_processes_prepare_train_and_evaluate_in_containers(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    edges = "".join(f"u{i % 50}\tlikes\tv{(i * i) % 20}\n" for i in range(2000))
    (data / "edges.tsv").write_text(edges)
    (data / "small.yaml").write_text(
        "training: {num_epochs: 3}\n"
        "model: {embeddings: {defaults: {embedding_dim: 8}}, loss: {softmax: {}}}\n"
        "train_data: {per_replica_batch_size: 50, global_negatives: 10}\n"
    )
    prepared, run = "/root/tmp/prepared", "/root/tmp/runs/small"
    verbs = [
        [
            "--",
            "prepare",
            "--train=/data/edges.tsv",
            "--split=0.8,0.1,0.1",
            "--relation=likes=user:video",
            f"--output={prepared}",
        ],
        [
            "--nproc-per-node=2",
            "--",
            "--config_yaml_path=/data/small.yaml",
            f"--graph={prepared}",
            f"--save_dir={run}",
        ],
        ["--", "evaluate", f"--run={run}", "--json"],
    ]
    for verb in verbs:
        process = launch(tmp_path, "twhin", f"--data={data}", *verb)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-3000:]
    report = json.loads(output[output.index("{") :])
    assert report["split"] == "test"
    assert report["link_prediction"]["edges"] > 0
    folder = tmp_path / "tmp" / "runs" / "small"
    (last,) = checkpoint.complete_steps(folder)
    assert checkpoint.load_meta(folder / str(last))["world_size"] == 2
