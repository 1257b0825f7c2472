"""projects/home/recap/data/generate_random_data.py and script/create_random_data.sh."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from projects.home.recap.data import generate_random_data
from projects.home.recap.data.dataset import build_dataset, describe_features
from projects.home.recap.data.generate_random_data import main, read_data_config
from tml.data.tfrecord import read_blocks
from tml.distributed import Job

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "projects/home/recap/script/create_random_data.sh"
SCHEMA = [
    {"feature_name": "x", "dtype": "float_list", "length": 12},
    {"feature_name": "flags", "dtype": "int64_list", "length": 3},
    {"feature_name": "id", "dtype": "int64_list", "length": 1},
    {"feature_name": "tags", "dtype": "int64_list", "length": -1, "num_values": 9},
    {"feature_name": "name", "dtype": "bytes_list", "length": 1},
    {"feature_name": "like", "dtype": "int64_list", "length": 1},
    {"feature_name": "reply", "dtype": "int64_list", "length": 1},
]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "schema.json").write_text(json.dumps({"schema": SCHEMA}))
    tree: dict[str, Any] = {
        "inputs": f"{tmp_path}/data/*.gz",
        "seg_dense_schema": {
            "schema_path": f"{tmp_path}/schema.json",
            "renamed_features": {"continuous": "x", "binary": "flags"},
        },
        "tasks": {"like": None, "reply": None},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"train_data": tree, "model": {"is": "not read"}}))
    return path


def make(config: Path, *arguments: str) -> Path:
    assert main(["--config_path", str(config), *arguments]) == 0
    return config.parent / "data"


def count(path: Path) -> int:
    return sum(len(block) for block in read_blocks(path))


def rows(config: Path) -> Any:
    data = read_data_config(str(config))
    job = Job(0, 1, 1, torch.device("cpu"))
    features = describe_features(data)
    dataset = build_dataset(data, features, job, 1, 10_000, num_epochs=1, shuffle=False)
    [(batch, _)] = dataset.batches(dataset.start())
    return batch


@pytest.mark.parametrize(("examples", "files", "sizes"), [(10, 3, [4, 3, 3]), (2, 8, [1, 1])])
def test_exactly_as_many_examples_as_wanted_in_several_files(
    config: Path, examples: int, files: int, sizes: list[int]
) -> None:
    folder = make(config, "--n_examples", str(examples), "--n_files", str(files))
    found = sorted(folder.iterdir())
    assert [count(path) for path in found] == sizes
    assert found[0].name == f"part-00000-of-{len(sizes):05d}.tfrecord.gz"
    assert all(path.read_bytes()[:2] == b"\x1f\x8b" for path in found)


def test_without_a_number_there_are_1024_examples(config: Path) -> None:
    folder = make(config)
    assert sum(map(count, folder.iterdir())) == 1024


def test_the_seed_decides_all_bytes(config: Path) -> None:
    def contents(seed: str, folder: str) -> dict[str, bytes]:
        output = config.parent / folder
        make(config, "--n_examples", "300", "--seed", seed, "--output_dir", str(output))
        return {path.name: path.read_bytes() for path in output.iterdir()}

    first = contents("5", "a")
    assert first == contents("5", "b")
    assert first != contents("6", "c")
    assert len(set(first.values())) == len(first)


def test_labels_are_0_or_1_and_follow_the_rule(config: Path) -> None:
    make(config, "--n_examples", "3000")
    batch = rows(config)
    assert set(batch.labels.unique().tolist()) == {0.0, 1.0}
    assert set(batch.binary.unique().tolist()) == {0.0, 1.0}
    share = batch.labels.mean(dim=0)
    assert ((share > 0.15) & (share < 0.4)).all()
    signals = batch.continuous[:, :8].double()
    for task in range(2):
        label = batch.labels[:, task].double()
        weights = torch.linalg.lstsq(signals, (label - label.mean())[:, None]).solution
        scores = (signals @ weights)[:, 0]
        order = scores.argsort()
        low, high = label[order[:1000]].mean(), label[order[-1000:]].mean()
        assert high > low + 0.25


def test_a_failure_leaves_the_folder_as_it_was(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(config, "--n_examples", "4", "--n_files", "2")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    block = generate_random_data.RandomExamples.block

    def fail(self: Any, number: int, count: int) -> list[bytes]:
        if number == 1:
            raise OSError("the disk is full")
        return block(self, number, count)

    monkeypatch.setattr(generate_random_data.RandomExamples, "block", fail)
    arguments = ["--config_path", str(config), "--n_examples", "4", "--n_files", "2", "--seed", "2"]
    assert main(arguments) == 1
    assert "error: the disk is full" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inputs": "/data/*/x.gz"}, "names no single folder; say which with --output_dir"),
        ({"seg_dense_schema": None, "feature_spec": "spec.yaml"}, "seg_dense_schema is not set"),
        ({"tasks": {"hate": None}}, "has no feature 'hate'"),
    ],
)
def test_configs_that_say_too_little_are_refused(
    config: Path, change: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = yaml.safe_load(config.read_text())
    tree["train_data"] |= change
    config.write_text(yaml.safe_dump(tree))
    assert main(["--config_path", str(config)]) == 1
    assert words in capsys.readouterr().err


def run_script(home: Path, python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    folder = home / "bin"
    folder.mkdir(exist_ok=True)
    (folder / "python").unlink(missing_ok=True)
    (folder / "python").write_text(f'#!/bin/sh\nexec {python} "$@"\n')
    (folder / "python").chmod(0o755)
    environment = {"HOME": str(home), "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_script_makes_its_folder_anew_and_touches_no_other(tmp_path: Path) -> None:
    folder = tmp_path / "tmp/recap_local_random_data"
    other = tmp_path / "tmp/runs/recap_local_debug"
    for place in (folder, other):
        place.mkdir(parents=True)
        (place / "old").write_text("")
    done = run_script(tmp_path, sys.executable, "--n_examples", "6", "--n_files", "2")
    assert done.returncode == 0, done.stderr
    assert sorted(map(count, folder.iterdir())) == [3, 3]
    assert (other / "old").exists()


def test_the_script_refuses_a_python_in_no_virtual_environment(tmp_path: Path) -> None:
    (tmp_path / "tmp/recap_local_random_data").mkdir(parents=True)
    (tmp_path / "tmp/recap_local_random_data/old").write_text("")
    done = run_script(tmp_path, str(Path(sys.executable).resolve()))  # what the venv was made of
    assert done.returncode == 1
    assert "in no virtual environment" in done.stderr
    assert (tmp_path / "tmp/recap_local_random_data/old").exists()


def test_the_published_schema_is_filled_and_read(tmp_path: Path) -> None:
    config = REPOSITORY / "projects/home/recap/config/local_prod.yaml"
    output = tmp_path / "data"
    make(config, "--n_examples", "4", "--n_files", "1", "--output_dir", str(output))
    data = read_data_config(str(config)).model_copy(update={"inputs": f"{output}/*.gz"})
    features = describe_features(data)
    width = features.num_continuous + features.num_binary + sum(features.vectors.values())
    assert width == 2776
    job = Job(0, 1, 1, torch.device("cpu"))
    dataset = build_dataset(data, features, job, 1, 4, num_epochs=1, shuffle=False)
    [(batch, _)] = dataset.batches(dataset.start())
    assert batch.continuous.shape == (4, 2117)
    assert np.isfinite(batch.continuous.numpy()).all()
