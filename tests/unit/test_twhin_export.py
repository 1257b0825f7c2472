"""Exported vectors: each format read back by another library, quantised rows decoded by hand, what
they cost, and folders that are never half-written.
"""

import errno
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from projects.twhin import export, quantization_cost, vector_files
from projects.twhin.best import Goal, describe, write_best
from projects.twhin.config import ModelConfig, TwhinConfig
from projects.twhin.export import COST, ExportOptions, export_vectors
from projects.twhin.exported import DESCRIPTION, FORMATS, Exported
from projects.twhin.model import Vectors, build_operators, weight_name
from projects.twhin.previous import open_previous
from projects.twhin.quantize import check_pq_bytes, pq_saves, quantise
from tml import checkpoint
from tml.config import ConfigError, build_config, to_yaml
from tml.data.parquet import DataError

DIM = 8
ROWS = {"user": 7, "item": 5}
NAMES = ["a\nb", "", "7", "ü", "x,y", '"', "z"]


def model_config(folder: Path | None = None, **extra: Any) -> ModelConfig:
    tables: list[dict[str, Any]] = [
        {"name": name, "num_embeddings": rows, "embedding_dim": DIM} for name, rows in ROWS.items()
    ]
    if folder is not None:
        vocab = folder / "user_names.parquet"
        order = [3, 0, 1, 2, 6, 5, 4]
        pq.write_table(pa.table({"id": order, "entity": [NAMES[i] for i in order]}), vocab)
        tables[0]["vocab"] = str(vocab)
    relation = {"name": "likes", "lhs": "user", "rhs": "item", "operator": "affine"}
    tree = {"embeddings": {"tables": tables}, "relations": [relation], "biases": True, **extra}
    return ModelConfig.model_validate(tree)


def random_vectors(config: ModelConfig) -> Vectors:
    generator = torch.Generator().manual_seed(3)
    tables = {t.name: t.num_embeddings for t in config.embeddings.tables}
    rows = {name: torch.randn(n, DIM, generator=generator) for name, n in tables.items()}
    biases = {name: torch.randn(n, generator=generator) for name, n in tables.items()}
    operators = build_operators(config)
    with torch.no_grad():
        for parameter in operators.parameters():
            parameter.normal_(generator=generator)
    return Vectors(config, rows, operators, biases if config.biases else {})


@pytest.mark.parametrize("form", FORMATS)
def test_a_format_is_read_back_by_its_own_library_and_by_ours(form: str, tmp_path: Path) -> None:
    config = model_config(tmp_path)
    vectors = random_vectors(config)
    folder = tmp_path / "out"
    paths = export_vectors(vectors, config, folder, ExportOptions((form,), index="none"), 12)
    assert paths == sorted(folder.iterdir())
    names = {path.name for path in paths}
    matrices = vectors.operators.get_parameter("matrices").detach().numpy()
    user, bias = vectors.tables["user"].numpy(), vectors.biases["user"].numpy()
    if form == "parquet":
        table = pq.read_table(folder / "user.parquet").to_pydict()
        assert (np.array(table["vector"], np.float32) == user).all()
        assert (np.array(table["bias"], np.float32) == bias).all()
        assert (table["id"], table["entity"]) == (list(range(7)), NAMES)
        assert "user.ids.parquet" not in names
    else:
        ids = pq.read_table(folder / "user.ids.parquet").to_pydict()
        assert (ids["id"], ids["entity"]) == (list(range(7)), NAMES)
        assert "item.ids.parquet" not in names  # it has no names
    if form == "npy":
        assert (np.load(folder / "user.npy") == user).all()
        assert (np.load(folder / "user.bias.npy") == bias).all()
        assert (np.load(folder / "relation_matrices.npy") == matrices).all()
    if form == "safetensors":
        from safetensors.torch import load_file

        path = folder / "vectors.safetensors"
        read = load_file(path)
        assert set(read) == {
            *("user", "item", "user.bias", "item.bias", "relations", "relation_matrices"),
        }
        assert torch.equal(read["user"], vectors.tables["user"])
        assert (read["relation_matrices"].numpy() == matrices).all()
        assert path.stat().st_mode == (folder / DESCRIPTION).stat().st_mode

    exported = Exported.open(folder)
    assert (exported.step, exported.comparator, exported.rows) == (12, "dot", ROWS)
    assert (exported.vectors("user") == user).all()
    found = exported.biases("user")
    assert found is not None
    assert (found == bias).all()
    assert (exported.relation_matrix(0) == matrices[0]).all()
    read_names = exported.names("user")
    assert read_names is not None
    assert read_names.to_pylist() == NAMES
    assert exported.names("item") is None


def test_int8_is_a_scale_a_row_and_fp16_the_nearest_half(tmp_path: Path) -> None:
    rows = np.array([[127, -63.4, 0.6, 0], [0, 0, 0, 0], [1e-3, -2e-3, 0, 1e-3]], np.float32)
    quantise("int8", "t", rows).write(tmp_path, "t")
    codes, scales = np.load(tmp_path / "t.int8.npy"), np.load(tmp_path / "t.int8_scale.npy")
    assert codes.tolist() == [[127, -63, 1, 0], [0, 0, 0, 0], [64, -127, 0, 64]]
    np.testing.assert_allclose(scales, [1.0, 0.0, 2e-3 / 127], rtol=1e-6)
    decoded = quantise("int8", "t", rows).decode()
    np.testing.assert_allclose(decoded, codes * scales[:, None], rtol=1e-6)
    assert (np.abs(decoded - rows) <= scales[:, None] / 2 * 1.001).all()
    half = quantise("fp16", "t", rows)
    assert half.num_bytes == rows.nbytes // 2
    assert (half.decode() == rows.astype(np.float16)).all()


def test_pq_decodes_as_faiss_does(tmp_path: Path) -> None:
    import faiss

    rows = np.random.default_rng(0).standard_normal((2000, DIM)).astype(np.float32)
    found = quantise("pq", "t", rows, pq_bytes=4)
    found.write(tmp_path, "t")
    codes, centroids = (
        np.load(tmp_path / "t.pq_codes.npy"),
        np.load(tmp_path / "t.pq_centroids.npy"),
    )
    assert (codes.shape, centroids.shape) == ((2000, 4), (4, 256, 2))
    quantizer = faiss.ProductQuantizer(DIM, 4, 8)
    faiss.copy_array_to_vector(centroids.ravel(), quantizer.centroids)
    assert (quantizer.decode(codes) == found.decode()).all()
    # Each piece is the nearest of its centroids.
    distances = ((rows[:50, 2:4][:, None] - centroids[1][None]) ** 2).sum(axis=2)
    assert (distances.argmin(axis=1) == codes[:50, 1]).all()
    assert ((found.decode() - rows) ** 2).mean() < 0.1
    assert found.num_bytes == 2000 * 4 + 4 * 256 * 2 * 4


def test_a_table_that_pq_would_not_make_smaller_stays_fp16() -> None:
    # 546 rows: codes and centroids 546·8 + 65,536 = 69,904 bytes, fp16 546·128 = 69,888.
    assert not pq_saves(546, 64, 8)
    assert pq_saves(547, 64, 8)
    assert quantise("pq", "tag", np.ones((46, 64), np.float32)).kind == "fp16"


def test_what_cannot_be_quantised_is_named_with_its_place() -> None:
    rows = np.ones((70_000, DIM), np.float32)
    rows[66_000, 3] = -70_000
    with pytest.raises(DataError, match=r"table 'user', row 66000: -70,000 is too large for fp16"):
        quantise("fp16", "user", rows)
    quantise("int8", "user", rows)
    rows[66_000, 3] = np.nan
    for kind in ("fp16", "int8", "pq"):
        with pytest.raises(DataError, match=r"table 'user', row 66000: the vector holds nan"):
            quantise(kind, "user", rows)
    with pytest.raises(ConfigError, match=r"--pq-bytes: 3 does not divide .* 1, 2, 4, 8"):
        check_pq_bytes(8, 3)


def write_edges(folder: Path, name: str, lhs: list[int], rhs: list[int]) -> str:
    (folder / name).mkdir()
    table = pa.table({"lhs": lhs, "rel": [0] * len(lhs), "rhs": rhs})
    pq.write_table(table, folder / name / "part-0.parquet")
    return f"{folder}/{name}/*.parquet"


def test_the_cost_is_that_of_ranking_with_the_decoded_vectors(tmp_path: Path) -> None:
    """User i sits on item i, until item 1 is moved onto item 0."""
    model = model_config(biases=False, comparator="squared_l2")
    tree = {
        "model": model.model_dump(exclude_unset=True),
        "train_data": {
            "data_root": write_edges(tmp_path, "train", [0], [4]),
            "global_negatives": 1,
        },
        "test_data": {"data_root": write_edges(tmp_path, "test", [0, 1, 2], [0, 1, 2])},
        "evaluation": {"retrieval": {"k": [1]}},
    }
    config = build_config(TwhinConfig, tree, "test")
    items = torch.zeros(5, DIM)
    items[:, 0] = torch.tensor([10.0, 10.3, 3.0, 4.0, 5.0])
    users = torch.zeros(7, DIM)
    users[:5] = items
    operators = build_operators(config.model)  # affine starts as the identity
    vectors = Vectors(config.model, {"user": users, "item": items}, operators)
    kinds = {
        kind: {name: quantise(kind, name, t.numpy()) for name, t in vectors.tables.items()}
        for kind in ("fp16", "int8")
    }
    report = quantization_cost.measure(config, vectors, kinds)
    assert report["full"] == {"mrr": 1.0, "hits@10": 1.0, "recall@1": 1.0}
    fp16, int8 = report["kinds"]
    assert fp16["metrics"]["mrr"] == {"full": 1.0, "quantised": 1.0, "lost": 0.0}
    assert (fp16["bytes_before"], fp16["bytes_after"], fp16["saved"]) == (384, 192, 0.5)
    # int8 keeps the largest number of a row, up to float32's rounding.
    assert int8["metrics"]["recall@1"]["quantised"] == pytest.approx(1.0)
    assert int8["bytes_after"] == 12 * (DIM + 4)
    merged = kinds["fp16"]["item"].arrays["fp16"]
    merged[1] = merged[0]  # both are now equally far from users 0 and 1: rank 1.5
    [spoilt] = quantization_cost.measure(config, vectors, {"fp16": kinds["fp16"]})["kinds"]
    heads = (1 + 1 / 2 + 1) / 3  # item 1 now has user 0 before user 1
    tails = (1 / 1.5 + 1 / 1.5 + 1) / 3
    assert spoilt["metrics"]["mrr"]["quantised"] == pytest.approx((heads + tails) / 2)
    assert spoilt["metrics"]["mrr"]["lost"] == pytest.approx(1 - (heads + tails) / 2)


def test_the_change_stands_beneath_its_number_with_a_label() -> None:
    full = {"mrr": 0.0142, "recall@1": 0.5}

    def kind(name: str, changes: list[float]) -> dict[str, Any]:
        metrics = {
            metric: {"full": value, "quantised": value * (1 + change), "lost": -value * change}
            for (metric, value), change in zip(full.items(), changes, strict=True)
        }
        kept_as = {"a[b]": name, "c": "fp16" if name == "pq" else name, "d": name}
        tables = {t: {"kept_as": kept, "neighbours_kept": 0.5} for t, kept in kept_as.items()}
        sizes = {"bytes_before": 1 << 21, "bytes_after": 1 << 20, "saved": 0.5}
        return {"kind": name, **sizes, "tables": tables, "metrics": metrics}

    report = {"split": "test", "protocol": "p", "neighbours": "n", "full": full}
    kinds = [kind("int8", [-1e-6, 0.1]), kind("pq", [-0.5, 0.0])]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(quantization_cost.render({**report, "kinds": kinds}))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert lines[4:] == [
        ["fp32", "2.00", ".0142", ".5000"],
        ["int8", "1.00", "50.0%", ".0142", ".5500", "a[b]", "50.0%"],
        ["change", "0.00%", "+10.00%", "c", "50.0%"],
        ["d", "50.0%"],
        ["pq", "1.00", "50.0%", ".0071", ".5000", "a[b]", "50.0%"],
        # Said in its row: no small table is in another kind unnoticed.
        ["change", "-50.00%", "0.00%", "c", "(as", "fp16)", "50.0%"],
        ["d", "50.0%"],
        ["test:", "p"],
        ["neighbours:", "n"],
        ["as", "fp16:", "too", "few", "rows", "for", "pq", "to", "take", "less", "than"]
        + ["fp16", "does"],
    ]


def test_neighbours_kept_are_those_of_brute_force() -> None:
    config = build_config(
        TwhinConfig,
        {
            "model": {
                "embeddings": {
                    "tables": [{"name": "e", "num_embeddings": 300, "embedding_dim": DIM}]
                },
                "relations": [{"name": "r", "lhs": "e", "rhs": "e"}],
            },
            "train_data": {"data_root": "nowhere", "global_negatives": 1},
        },
        "test",
    )
    rows = torch.randn(300, DIM, generator=torch.Generator().manual_seed(0))
    vectors = Vectors(config.model, {"e": rows}, build_operators(config.model))
    found = quantise("int8", "e", rows.numpy())
    found.arrays["int8"][:, 4:] = 0  # half of the numbers are lost
    report = quantization_cost.measure(config, vectors, {"int8": {"e": found}})
    assert report["unmeasured"] == "the run has no held-out data"

    def nearest(x: torch.Tensor) -> list[set[int]]:
        cosines = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=2)
        return [set(c.topk(10).indices.tolist()) for c in cosines.fill_diagonal_(-2)]

    pairs = zip(nearest(rows), nearest(torch.from_numpy(found.decode())), strict=True)
    kept = sum(len(a & b) for a, b in pairs) / 3000
    assert 0.1 < kept < 0.9
    assert report["kinds"][0]["tables"]["e"]["neighbours_kept"] == pytest.approx(kept, abs=1e-3)


def test_another_folder_is_never_replaced_and_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = model_config()
    vectors = random_vectors(config)
    edges = tmp_path / "edges"
    edges.mkdir()
    pq.write_table(pa.table({"lhs": [1]}), edges / "part-0.parquet")
    with pytest.raises(DataError, match="holds something else than exported vectors"):
        export_vectors(vectors, config, edges)
    assert [path.name for path in edges.iterdir()] == ["part-0.parquet"]

    folder = tmp_path / "out"
    before = export_vectors(vectors, config, folder, ExportOptions(("npy",), ["int8"]))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(vector_files.WRITERS, "safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        export_vectors(vectors, config, folder, ExportOptions(("npy", "safetensors")))
    assert sorted(folder.iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edges", "out"]
    after = export_vectors(vectors, config, folder, measure=None)
    assert not any(path.suffix == ".npy" for path in after)


def test_the_runs_own_vectors_keep_their_parquet_and_can_be_started_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_config(tmp_path)
    vectors = random_vectors(model)
    data = {"data_root": "nowhere", "global_negatives": 1}
    tree = {"model": model.model_dump(exclude_unset=True), "train_data": data}
    config = build_config(TwhinConfig, tree, "test")
    saved = {weight_name(name): rows for name, rows in vectors.tables.items()}
    for name, bias in vectors.biases.items():
        saved[weight_name(f"{name}.bias")] = torch.nn.functional.pad(bias.unsqueeze(1), (0, 3))
    saved |= {name: p.detach() for name, p in vectors.operators.named_parameters()}
    checkpoint.save(tmp_path / "run", 3, saved, {}, to_yaml(config))
    run = ["--run", str(tmp_path / "run"), "--index", "none", "--format", "npy"]
    assert export.main(run) == 0
    folder = tmp_path / "run" / "vectors"
    shown = capsys.readouterr().out
    assert shown.startswith(f"{folder}:\n  ")
    assert shown.count(str(tmp_path)) == 1
    assert shown.split()[1].endswith(",")
    assert max(map(len, shown.splitlines()[1:])) <= 80
    names = {path.name for path in folder.iterdir()}
    assert {"user.parquet", "user.npy", "user.ids.parquet", "relations.parquet"} <= names
    previous = open_previous(folder)  # user.ids.parquet is no table
    assert previous.num_rows == ROWS
    assert previous.names("user").to_pylist() == NAMES
    assert (previous.rows("item") == vectors.tables["item"].numpy()).all()
    assert export.main([*run, "--output", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / "user.parquet").exists()
    with pytest.raises(ConfigError, match=r"neither a run folder .* --format parquet writes them"):
        open_previous(tmp_path / "out")
    capsys.readouterr()
    for step in (7, 9):
        checkpoint.save(tmp_path / "run", step, saved, {}, to_yaml(config))
    write_best(tmp_path / "run", describe(7, "validation", Goal(), 0.5))
    for more, step in ([], 7), (["--step=newest"], 9), (["--step=3"], 3):
        assert export.main([*run, *more, "--json"]) == 0
        written = capsys.readouterr()
        assert ("step 7, the best by validation" in written.err) == (not more)
        assert Exported.open(Path(json.loads(written.out)["folder"])).step == step
    assert export.main([*run, "--step=17"]) == 2
    assert "has no step 17; complete are 3, 7, 9" in " ".join(capsys.readouterr().err.split())
    assert export.main([*run, "--quantize", "int8", "--max-edges", "0"]) == 2
    assert "--max-edges: 0 edges tell nothing" in capsys.readouterr().err
    (folder / "user.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"user.parquet cannot be read: .*export again"):
        open_previous(folder)


def test_a_cost_is_written_beside_the_vectors(tmp_path: Path) -> None:
    config = model_config()
    asked: list[Any] = []

    def measure(quantised: Any) -> dict[str, Any]:
        asked.append(quantised)
        return {"kinds": []}

    options = ExportOptions(("parquet",), ["fp16", "pq"], pq_bytes=2)
    folder = tmp_path / "out"
    names = {
        path.name
        for path in export_vectors(random_vectors(config), config, folder, options, 1, measure)
    }
    assert {"user.fp16.npy", "user.parquet", "user.faiss", COST} <= names
    assert asked[0]["pq"]["user"].kind == "fp16"
    assert json.loads((folder / COST).read_text()) == {"kinds": []}
