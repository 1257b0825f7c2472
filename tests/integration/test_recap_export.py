"""export.py on a small model with every kind of input: what is written scores like the model, also
where nothing of this project is at hand; bad input leaves nothing behind.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from projects.home.recap import export, serving
from projects.home.recap.config import RecapConfig
from projects.home.recap.data.dataset import describe_features
from projects.home.recap.model.build import build_model, load_model, model_state, read_config
from projects.home.recap.model.config import ModelConfig
from projects.home.recap.model.inference import tensors_of
from projects.home.recap.model.model import RankingModel
from tml import checkpoint
from tml.config import load_config, to_yaml
from tml.distributed import Job

ROOT = Path(__file__).parents[2]
ROWS = 300
CPU = Job(rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))
MLP = {"layer_sizes": [16, 1], "batch_norm": {}}
SPEC = {
    "continuous": [{"column": "history", "width": 8}, "age"],
    "binary": ["is_author", "is_reply"],
    "discrete": [{"column": "hashed", "width": 3}],
    "vectors": {"author_vector": 6},
    "categorical": {"video": {"num_values": 20}, "country": {"vocabulary": "country.parquet"}},
    "bags": {"tags": {"num_values": 9}},
    "ids": ["user_id", "position"],
    "labels": ["click", "like"],
}


def write_data(folder: Path) -> None:
    """Rows that hold what rows may hold: NaN, infinity, a constant row, empty lists, any int64."""
    rng = np.random.default_rng(0)
    history = rng.standard_normal((ROWS, 8)) * 10.0 ** rng.integers(-3, 6, 8)
    history[0, 0], history[1, 1], history[2] = np.nan, np.inf, 0
    limit = np.iinfo(np.int64)
    tags = [rng.integers(0, 9, n).tolist() for n in rng.integers(0, 5, ROWS)]
    tags[3] = []
    signal = np.sign(history[:, 4]) + rng.standard_normal(ROWS)
    columns: dict[str, Any] = {
        "history": history.tolist(),
        "age": rng.integers(0, 100, ROWS).astype(np.float64),
        "is_author": rng.integers(0, 2, ROWS),
        "is_reply": rng.integers(0, 2, ROWS),
        "hashed": rng.integers(limit.min, limit.max, (ROWS, 3)).tolist(),
        "author_vector": rng.standard_normal((ROWS, 6)).astype(np.float32).tolist(),
        "video": rng.integers(0, 20, ROWS),
        "country": rng.choice(["de", "fr", "xx"], ROWS),
        "tags": tags,
        "user_id": rng.integers(limit.min, limit.max, ROWS),
        "position": rng.integers(0, 30, ROWS),
        "click": (signal > 0).astype(np.int64),
        "like": (signal > 1.5).astype(np.int64),
    }
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    pq.write_table(pa.table({"value": ["de", "fr"]}), folder / "country.parquet")
    (folder / "spec.yaml").write_text(yaml.safe_dump(SPEC))


def config_tree(folder: Path) -> dict[str, Any]:
    data = {
        "inputs": f"{folder}/rows.parquet",
        "feature_spec": f"{folder}/spec.yaml",
        # Neither the order of the model's tasks nor all of them there.
        "tasks": {"like": None, "click": {"neg_downsampling_rate": 0.5}},
    }
    rate = {"constant": 0.01}
    return {
        "training": {"num_train_steps": 1, "downsampling_correction": "calibration"},
        "model": {
            "tasks": {"click": {"mlp_config": MLP}, "like": {"mlp_config": MLP}},
            "backbone": {
                "mask_net_config": {"mask_blocks": [{"output_size": 16, "aggregation_size": 8}] * 2}
            },
            "featurization_config": {"double_norm_log_config": {}},
            "position_debias_config": {"num_dims": 4},
            "small_embeddings": {
                "default_dim": 4,
                "tables": [
                    {
                        "name": "hashed",
                        "embedding_dim": 5,
                        "features": ["discrete.1"],
                        "hash_values": True,
                        "num_embeddings": 40,
                    }
                ],
            },
            "large_embeddings": {
                "tables": [
                    {
                        "name": "hashed",
                        "embedding_dim": 4,
                        "features": ["user_id"],
                        "hash_values": True,
                        "num_embeddings": 50,
                        "init_scale": 0.5,
                    },
                    {
                        "name": "tags",
                        "embedding_dim": 4,
                        "features": ["tags"],
                        "pooling": "sum",
                        "init_scale": 0.5,
                    },
                ]
            },
        },
        "train_data": data,
        "validation_data": {"all": data},
        "optimizer": {"single_task_learning_rate": rate},
    }


def randomise(module: torch.nn.Module) -> None:
    """Values as training leaves them: no bias at 0, no running variance at 1."""
    torch.manual_seed(1)
    for name, value in module.state_dict().items():
        if name.endswith(("bias", "running_mean")):
            value.normal_(std=0.3)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one step: a model with large tables and a learned calibration."""
    folder = tmp_path_factory.mktemp("run")
    write_data(folder)
    (folder / "given.yaml").write_text(yaml.safe_dump(config_tree(folder)))
    config = load_config(RecapConfig, folder / "given.yaml")
    model, tables = build_model(config, describe_features(config.train_data), CPU)
    randomise(model)
    x = torch.linspace(0, 1, 30)
    model.set_calibration("like", x, x**2)
    state = model_state(model, tables)
    checkpoint.save(folder / "run", 7, state, {"versions": {}}, to_yaml(config))
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("exported") / "ranker"
    assert export.main(["--run", str(run), "--output", str(output), "--num_rows", "200"]) == 0
    return output


def signature_of(folder: Path) -> dict[str, Any]:
    tree = json.loads((folder / "signature.json").read_text())
    assert isinstance(tree, dict)
    return tree


def score_by_training_code(run: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(inputs, probabilities) of the first 200 rows by the model as it is trained: FBGEMM's tables,
    lists as they are.
    """
    config = read_config(run / "7")
    model, features = load_model(run / "7", config, CPU)
    rows = export.read_rows(config, None, 200)
    batches = rows.batches
    assert len(batches) == 1
    (batch,) = batches
    with torch.no_grad():
        probabilities = model.probabilities(model(batch, model.lookup(batch)))
    inputs = {name: value.numpy() for name, value in tensors_of(batch, features).items()}
    return inputs, probabilities.numpy()


def test_the_folder_holds_the_formats_and_says_what_they_are(exported: Path) -> None:
    signature = signature_of(exported)
    files = {p.relative_to(exported).as_posix() for p in exported.rglob("*") if p.is_file()}
    assert files == {*signature["files"], "signature.json"}
    assert {"model.pt2", "model.onnx", "model.int8.onnx", "config.yaml"} <= files
    assert signature["step"] == 7
    assert signature["tasks"] == ["click", "like"]
    inputs = {one["name"]: (one["dtype"], one["shape"]) for one in signature["inputs"]}
    assert inputs == {
        "continuous": ("float32", ["batch", 9]),
        "binary": ("float32", ["batch", 2]),
        "discrete": ("int64", ["batch", 3]),
        "vector.author_vector": ("float32", ["batch", 6]),
        "categorical.video": ("int64", ["batch"]),
        "categorical.country": ("int64", ["batch"]),
        "ids.user_id": ("int64", ["batch"]),
        "bags.tags": ("int64", ["batch", "length"]),
    }  # ids.position is an input of training alone
    country = next(one for one in signature["inputs"] if one["name"] == "categorical.country")
    vocabulary = pq.read_table(exported / country["vocabulary"])
    assert vocabulary.column("value").to_pylist() == ["de", "fr"]
    assert country["num_rows"] == 3
    assert signature["versions"].keys() >= {"torch", "onnx", "onnxruntime"}
    assert signature["compared_on"]["num_rows"] == 200


def test_differences_lie_within_the_tolerances_and_int8_tells_its_cost(exported: Path) -> None:
    formats = signature_of(exported)["formats"]
    for name, one in formats.items():
        assert one["max_difference"] <= one["tolerance"] == export.TOLERANCES[name]
        assert one["bytes"] == (exported / one["file"]).stat().st_size
        assert one["examples_per_s"] > 0
    assert formats["int8"]["max_difference"] > 1e-4  # it is another model
    for values in formats["int8"]["auc"].values():
        assert values["model"] - values["int8"] == pytest.approx(values["cost"], abs=1e-12)


@pytest.mark.parametrize("file", ["model.onnx", "model.int8.onnx"])
def test_onnxruntime_alone_scores_as_the_training_code_does(
    file: str, run: Path, exported: Path, tmp_path: Path
) -> None:
    """The program of docs/serving.md, in a process that has numpy and onnxruntime."""
    inputs, expected = score_by_training_code(run)
    np.savez(tmp_path / "rows.npz", **inputs)
    snippet, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "docs/serving.md").read_text(), re.S)
    imports = set(re.findall(r"^(?:import|from) (\w+)", snippet, re.M))
    assert imports == {"json", "sys", "numpy", "onnxruntime"}
    check = (
        "assert not {'torch', 'tml', 'projects', 'onnx'} & {m.split('.')[0] for m in sys.modules}"
    )
    (tmp_path / "score.py").write_text(snippet + check + "\n")
    done = subprocess.run(
        [sys.executable, "-P", "score.py", str(exported), "rows.npz", file],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["click", "like"]
    found = np.array([line[1:] for line in lines], dtype=np.float64).T
    assert found.shape == expected.shape == (200, 2)
    assert np.abs(found - expected).max() < (1e-5 if file == "model.onnx" else 0.1)


@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_any_number_of_rows_and_any_length_of_lists_can_be_scored(
    form: str, run: Path, exported: Path
) -> None:
    inputs, expected = score_by_training_code(run)
    path = exported / export.FILES[form]
    scorer = serving.open_program(path) if form == "torch" else serving.open_onnx(path)
    names = [one["name"] for one in signature_of(exported)["inputs"]]
    for start, stop in ((0, 1), (3, 5), (7, 150)):
        rows = {name: inputs[name][start:stop] for name in names}
        rows["bags.tags"] = np.pad(rows["bags.tags"], ((0, 0), (0, 3)), constant_values=-1)
        found = scorer(rows)
        assert found.shape == (stop - start, 2)
        assert np.abs(found - expected[start:stop]).max() < 1e-5


def test_values_outside_a_table_count_as_unknown(exported: Path, run: Path) -> None:
    inputs, _ = score_by_training_code(run)
    names = [one["name"] for one in signature_of(exported)["inputs"]]
    rows = {name: inputs[name][:4].copy() for name in names}
    scorer = serving.open_onnx(exported / "model.onnx")
    rows["categorical.video"][:] = 0
    unknown = scorer(rows)
    rows["categorical.video"][:] = [20, 10**12, -5, -(10**12)]
    assert (scorer(rows) == unknown).all()


def test_weights_too_large_for_one_file_lie_beside_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "MAX_PROTOBUF_BYTES", 0)
    output = tmp_path / "out"
    command = ["--run", str(run), "--output", str(output), "--num_rows", "200"]
    assert export.main([*command, "--format", "onnx", "int8"]) == 0
    assert {"model.onnx.data", "model.int8.onnx.data"} <= set(signature_of(output)["files"])
    inputs, expected = score_by_training_code(run)
    names = [one["name"] for one in signature_of(output)["inputs"]]
    for name, allowed in (("onnx", 1e-5), ("int8", 0.1)):
        found = serving.open_onnx(output / export.FILES[name])({n: inputs[n] for n in names})
        assert np.abs(found - expected).max() < allowed


def test_nothing_in_the_folder_names_this_machine(exported: Path) -> None:
    for name in export.FILES.values():
        content = (exported / name).read_bytes()
        assert str(ROOT).encode() not in content, name
        assert b"inference.py" not in content, name


DEEP = {"layer_sizes": [8, 4], "final_layer_activation": True}
NETWORKS: dict[str, dict[str, Any]] = {
    "dcn, share_partial, clip": {
        "backbone": {"dcn_config": {"projection_dim": 3, "parallel_mlp": DEEP}},
        "multi_task_type": "share_partial",
        "featurization_config": {"clip_log1p_abs_config": {}},
    },
    "dlrm and mmoe": {
        "backbone": {"dlrm_config": {"bottom_mlp": DEEP, "top_mlp": DEEP}},
        "mmoe_config": {"num_experts": 2, "expert": DEEP},
        "small_embeddings": {"default_dim": 4},
    },
}


@pytest.mark.parametrize("network", NETWORKS)
def test_other_networks_can_be_exported_too(network: str, run: Path, tmp_path: Path) -> None:
    tree = config_tree(run.parent)["model"]
    for key in ("position_debias_config", "small_embeddings", "large_embeddings"):
        del tree[key]
    config = ModelConfig.model_validate({**tree, **NETWORKS[network]})
    rows = export.read_rows(read_config(run / "7"), None, 100)
    torch.manual_seed(0)
    model = RankingModel(config, rows.features).eval()
    randomise(model)
    (batch,) = rows.batches
    with torch.no_grad():
        expected = model.probabilities(model(batch)).numpy()
    traced, tensors = serving.export_program(model, rows.features)
    serving.save_onnx(traced, tensors, tmp_path / "model.onnx")
    inputs = {n: t.numpy() for n, t in tensors_of(batch, rows.features).items() if n in tensors}
    found = serving.open_onnx(tmp_path / "model.onnx")(inputs)
    assert expected.std(axis=0).min() > 1e-3
    assert np.abs(found - expected).max() < 1e-5


def test_an_export_replaces_an_earlier_one_and_holds_only_what_was_asked_for(
    run: Path, tmp_path: Path
) -> None:
    command = ["--run", str(run), "--output", str(tmp_path / "out"), "--num_rows", "50"]
    assert export.main([*command, "--format", "int8"]) == 0
    assert (tmp_path / "out" / "model.int8.onnx").exists()
    assert not (tmp_path / "out" / "model.onnx").exists()
    assert export.main([*command, "--format", "torch"]) == 0
    assert list(signature_of(tmp_path / "out")["formats"]) == ["torch"]
    assert not (tmp_path / "out" / "model.int8.onnx").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_with_something_else_is_left_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--run", str(run), "--output", str(tmp_path), "--format", "torch"]
    (tmp_path / "thesis.txt").write_text("years of work")
    assert export.main(command) == 2
    assert "thesis.txt; choose another --output" in capsys.readouterr().err
    (tmp_path / "signature.json").write_text(
        json.dumps({"written_by": export.WRITTEN_BY, "files": []})
    )
    assert export.main(command) == 2
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert "thesis.txt" in capsys.readouterr().err
    assert export.main([*command[:2], "--output", str(tmp_path / "thesis.txt")]) == 2
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}.*"))


def test_too_large_a_difference_leaves_nothing_behind(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--run", str(run), "--output", str(tmp_path / "out"), "--num_rows", "50"]
    assert export.main([*command, "--tolerance", "int8=1e-9"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: format int8: a probability differs by")
    assert "more than 1e-09; nothing was written" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "{tmp}/none"], "has no complete step folder"),
        (["--run", "{run}", "--step", "8"], "checkpoint {run}/8 does not exist"),
        (["--run", "{run}", "--output", "{tmp}/file/out"], "{tmp}/file/out cannot be written: "),
        (["--run", "{run}", "--rows", "{tmp}/*.none"], "*.none"),
        (["--run", "{run}", "--tolerance", "int4=1"], "--tolerance 'int4=1': write FORMAT=VALUE"),
        (["--run", "{run}", "--num_rows", "0"], "--num_rows 0: must be at least 1"),
    ],
)
def test_bad_input_is_one_clear_error(
    arguments: list[str],
    message: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    filled = [one.replace("{tmp}", str(tmp_path)).replace("{run}", str(run)) for one in arguments]
    given = ["--output", str(tmp_path / "out"), "--format", "torch", *filled]
    assert export.main(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message.replace("{tmp}", str(tmp_path)).replace("{run}", str(run)) in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_missing_packages_are_named_with_what_to_install(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serving, "PACKAGES", ("onnx", "onnx_that_is_not_there"))
    command = ["--run", str(run), "--output", str(tmp_path / "out")]
    assert export.main(command) == 2
    error = capsys.readouterr().err
    assert "--format onnx int8: onnx_that_is_not_there is not installed" in error
    assert "install --no-deps -r requirements/export.txt" in error
    assert export.main([*command, "--format", "torch", "--num_rows", "20"]) == 0
