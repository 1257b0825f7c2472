"""neighbors: numpy's queries equal torch's scores, FAISS's answers equal brute force, names are
found or told apart, and the program starts without torch.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from projects.twhin import index as index_module
from projects.twhin.comparators import Comparator
from projects.twhin.config import ModelConfig
from projects.twhin.export import ExportOptions, export_vectors
from projects.twhin.exported import Exported
from projects.twhin.index import find_index, read_index, search, write_indexes
from projects.twhin.model import Vectors, build_operators
from projects.twhin.neighbors import find_entity, find_neighbors, main
from projects.twhin.operators import Operator
from projects.twhin.queries import related, search_exactly, similar
from projects.twhin.seen import seen_rows
from tml.config import ConfigError

DIM = 8
ROWS = {"user": 30, "item": 40}
ROOT = Path(__file__).parents[2]


def build(
    folder: Path, *, rows: dict[str, int] = ROWS, index: str = "none", **extra: Any
) -> tuple[Vectors, Exported]:
    """Random vectors and their export; users are called u0 …, items i0 …, the last two 7, both."""
    tables = []
    for name, count in rows.items():
        names = [f"{name[0]}{i}" for i in range(count - 2)] + ["7", "both"]
        path = folder / f"{name}_names.parquet"
        pq.write_table(pa.table({"id": list(range(count)), "entity": names}), path)
        tables.append(
            {"name": name, "num_embeddings": count, "embedding_dim": DIM, "vocab": str(path)}
        )
    operators = extra.pop("operators", ["translation"])
    relations = [
        {"name": f"r{i}", "lhs": "user", "rhs": "item", "operator": operator}
        for i, operator in enumerate(operators)
    ]
    tree = {"embeddings": {"tables": tables}, "relations": relations, **extra}
    config = ModelConfig.model_validate(tree)
    generator = torch.Generator().manual_seed(5)
    vectors = {name: torch.randn(n, DIM, generator=generator) for name, n in rows.items()}
    biases = {name: torch.randn(n, generator=generator) for name, n in rows.items()}
    built = build_operators(config)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(generator=generator)
    whole = Vectors(config, vectors, built, biases if config.biases else {})
    export_vectors(whole, config, folder / "vectors", ExportOptions(("npy",), index=index))
    return whole, Exported.open(folder / "vectors")


@pytest.mark.parametrize("reciprocal", [False, True])
@pytest.mark.parametrize("comparator", get_args(Comparator))
def test_a_query_in_numpy_scores_as_the_model_does(
    comparator: str, reciprocal: bool, tmp_path: Path
) -> None:
    operators = list(get_args(Operator))
    settings = {"comparator": comparator, "reciprocal": reciprocal, "operators": operators}
    # With all operators at once the model moves candidates; one model each shows the other way.
    for number, kinds in enumerate([operators, ["identity"], ["translation"]]):
        folder = tmp_path / str(number)
        folder.mkdir()
        model, exported = build(folder, **{**settings, "operators": kinds, "biases": number != 1})
        for relation in range(len(kinds)):
            for side, table in (("rhs", "item"), ("lhs", "user")):
                expected = model.score(relation, side, torch.tensor([4]))[0].numpy()
                query = related(exported, relation, side, 4)
                rows, scores = search_exactly(query, exported, table, ROWS[table])
                assert sorted(rows) == list(range(ROWS[table]))
                np.testing.assert_allclose(scores, expected[rows], atol=2e-4, rtol=2e-4)
                assert (np.diff(scores) <= 0).all()


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("comparator", get_args(Comparator))
def test_a_flat_index_answers_as_brute_force_does(
    comparator: str, biases: bool, tmp_path: Path
) -> None:
    _, exported = build(tmp_path, comparator=comparator, biases=biases, index="auto")
    query = related(exported, 0, "rhs", 4)
    info = find_index(exported, "item", query)
    if comparator == "l2" and biases:
        assert info is None
        return
    assert info is not None
    rows, scores = search(read_index(exported, info), info, query, exported, 12)
    expected_rows, expected = search_exactly(query, exported, "item", 12)
    assert rows.tolist() == expected_rows.tolist()
    np.testing.assert_allclose(scores, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["IVF8,Flat", "OPQ4_8,IVF8,PQ4x4"])
def test_a_large_table_is_searched_in_part_and_its_recall_is_true(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "OPQ_ROUNDS", 1)
    rows = {"user": 100, "item": 600}
    _, exported = build(tmp_path, rows=rows, biases=True)
    written = {(info.table, info.answers): info for info in write_indexes(exported, kind)}
    info = written["item", "relations"]
    assert info.recall >= 0.95
    assert info.nprobe is not None
    assert info.holds_vectors == (kind == "IVF8,Flat")
    assert ("item", "similar") in written  # by cosine, beside dot
    user_kind = written["user", "relations"].factory  # of too few rows for quantisation
    assert user_kind == ("Flat" if "PQ" in kind else kind)
    hits = 0.0
    for user in range(0, 90, 3):
        query = related(exported, 0, "rhs", user)
        found, scores = search(read_index(exported, info), info, query, exported, 10)
        exact, exact_scores = search_exactly(query, exported, "item", 10)
        hits += len(set(found) & set(exact)) / 10
        both = [(s, exact_scores[exact == row]) for row, s in zip(found, scores, strict=True)]
        for score, true in both:
            if len(true):
                assert score == pytest.approx(true[0], abs=1e-4)
    assert hits / 30 > 0.85
    like = similar(exported, "item", 3)
    nearest = find_index(exported, "item", like)
    assert nearest is not None
    assert search(read_index(exported, nearest), nearest, like, exported, 3)[0][0] == 3


def test_alike_entities_are_by_cosine_without_the_entity_itself(tmp_path: Path) -> None:
    model, exported = build(tmp_path, index="auto")
    answer = find_neighbors(exported, find_entity(exported, "u3"), 5)
    assert answer["entity"] == {"type": "user", "id": 3, "name": "u3"}
    users = model.tables["user"]
    cosines = torch.nn.functional.cosine_similarity(users[3], users, dim=1)
    cosines[3] = -2
    best = cosines.topk(5)
    found = answer["neighbors"]
    assert [n["id"] for n in found] == best.indices.tolist()
    np.testing.assert_allclose([n["score"] for n in found], best.values.numpy(), atol=1e-6)
    assert [n["rank"] for n in found] == [1, 2, 3, 4, 5]
    assert answer["asked"] == {"type": "user", "measure": "cosine"}


def test_a_relation_ranks_the_other_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, exported = build(tmp_path, index="auto")
    answer = find_neighbors(exported, find_entity(exported, "u3"), 4, relation="r0")
    best = model.score(0, "rhs", torch.tensor([3]))[0].topk(4)
    assert [n["id"] for n in answer["neighbors"]] == best.indices.tolist()
    assert answer["search"] == {"method": "FAISS Flat", "exact": True}
    assert answer["asked"]["direction"] == "tails"
    heads = find_neighbors(exported, find_entity(exported, "i3"), 4, relation="r0")
    best = model.score(0, "lhs", torch.tensor([3]))[0].topk(4)
    assert [n["id"] for n in heads["neighbors"]] == best.indices.tolist()
    assert heads["asked"] == {
        "type": "user",
        "measure": "dot",
        "relation": "r0",
        "direction": "heads",
    }
    with pytest.raises(ConfigError, match="r0 goes from user to item; it does not lead from"):
        find_neighbors(exported, find_entity(exported, "i3"), relation="r0", direction="tails")
    for relation, message in (
        ("r1", "; there are r0"),
        ("r0x", "; did you mean r0?; there are r0"),
    ):
        with pytest.raises(ConfigError, match=re.escape(f"there is no {relation!r}{message}")):
            find_neighbors(exported, find_entity(exported, "i3"), relation=relation)
    assert main([f"--run={tmp_path}/nope", "--id=1"]) == 2
    assert "--run: there is no folder" in capsys.readouterr().err


def test_what_training_edges_join_is_left_out_on_demand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, exported = build(tmp_path, index="auto", operators=["translation", "identity"])
    entity = find_entity(exported, "u3")
    best = model.score(1, "rhs", torch.tensor([3]))[0].argsort(descending=True).tolist()
    seen = [best[0], best[2], best[2]]
    # An edge of the other relation, one of another user, and one before the offset.
    edges = {
        "lhs": [3, 3, 9, 3, 3, 3],
        "rel": [1, 0, 1, 1, 1, 1],
        "rhs": [best[4], *best[1:3], *seen],
    }
    pq.write_table(pa.table(edges), tmp_path / "edges.parquet", row_group_size=2)
    monkeypatch.setenv("HOME", str(tmp_path))  # as a run writes its config
    data = {"data_root": "${HOME}/edges.parquet", "offset": 1, "limit": None, "asks": "rhs"}
    (tmp_path / "config.yaml").write_text(json.dumps({"train_data": data}))  # JSON is YAML
    answer = find_neighbors(exported, entity, 3, relation="r1", unseen_in=tmp_path)
    assert [found["id"] for found in answer["neighbors"]] == [best[1], best[3], best[4]]
    assert answer["asked"]["seen"] == 2
    assert seen_rows(tmp_path, 1, "lhs", best[0]).tolist() == [3]  # heads
    flags = ["--entity=u3", "--unseen-only", "--json"]
    assert main([*flags, f"--run={tmp_path}"]) == 2
    assert "--unseen-only: it belongs to a --relation" in capsys.readouterr().err
    assert main([*flags, "--relation=r1", f"--vectors={tmp_path}/vectors"]) == 2
    assert "training edges are found through --run" in capsys.readouterr().err
    (tmp_path / "config.yaml").unlink()
    assert main([*flags, "--relation=r1", f"--run={tmp_path}"]) == 2
    assert "config.yaml cannot be read: No such file" in capsys.readouterr().err


def test_without_faiss_all_rows_are_compared_and_a_damaged_index_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, exported = build(tmp_path, index="auto")
    entity = find_entity(exported, "u3")
    by_index = find_neighbors(exported, entity, 4, relation="r0")
    monkeypatch.setattr(index_module, "find_spec", lambda _: None)
    by_rows = find_neighbors(exported, entity, 4, relation="r0")
    assert by_rows["search"] == {"method": "all rows", "exact": True}
    ids = [[found["id"] for found in answer["neighbors"]] for answer in (by_index, by_rows)]
    assert ids[0] == ids[1]
    monkeypatch.undo()
    (tmp_path / "vectors" / "item.index.json").write_text("{")
    assert main([f"--run={tmp_path}", "--entity=u3", "--relation=r0"]) == 2
    assert "item.index.json cannot be read" in capsys.readouterr().err


def test_a_kind_that_shortens_vectors_has_its_candidates_compared_exactly(tmp_path: Path) -> None:
    _, exported = build(tmp_path)
    written = write_indexes(exported, "PCA4,Flat")
    info = next(each for each in written if (each.table, each.answers) == ("item", "relations"))
    assert not info.holds_vectors
    query = related(exported, 0, "rhs", 3)
    rows, scores = search(read_index(exported, info), info, query, exported, 2)
    exact, exact_scores = search_exactly(query, exported, "item", 2)  # all 40 are candidates
    assert rows.tolist() == exact.tolist()
    np.testing.assert_allclose(scores, exact_scores, atol=1e-5)


def test_a_name_is_found_or_what_is_near_it_told(tmp_path: Path) -> None:
    _, exported = build(tmp_path)
    assert find_entity(exported, "7", "user").row == 28  # a name, though row 7 exists
    with pytest.raises(ConfigError, match=r"'both' is in several tables: user, item; .*--type"):
        find_entity(exported, "both")
    with pytest.raises(ConfigError, match=r"there is no 'u1x' in user, item; close .*'u1.*user"):
        find_entity(exported, "u1x")
    with pytest.raises(ConfigError, match=r"there is no '12' in table 'item'.*use --id"):
        find_entity(exported, "12", "item")
    with pytest.raises(ConfigError, match="--type: there is no 'tweet'; there are user, item"):
        find_entity(exported, "u1", "tweet")


def test_the_program_answers_without_torch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, exported = build(tmp_path, index="auto")
    flags = ["--run", str(tmp_path), "--entity", "u3", "--relation", "r0", "--k", "2", "--json"]
    program = (
        "import sys; from projects.twhin.neighbors import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'pandas', 'pydantic.v1'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *flags],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    expected = find_neighbors(exported, find_entity(exported, "u3"), 2, relation="r0")
    assert json.loads(done.stdout) == expected
    assert main([*flags[:4]]) == 0
    assert "user nearest to user u3" in capsys.readouterr().out
    assert main(["--run", str(tmp_path), "--id", "30", "--type", "user"]) == 2
    assert "table 'user' has the rows 0 to 29, not 30" in capsys.readouterr().err
    assert main(["--vectors", str(tmp_path / "none"), "--entity", "u3"]) == 2
    assert "holds no exported vectors" in capsys.readouterr().err


def test_faiss_and_torch_get_on_in_one_process() -> None:
    """Both bring an OpenMP; where those are at odds, k-means or a backward pass crashes."""
    program = (
        "import torch, faiss, numpy as np\n"
        "x = np.random.default_rng(0).standard_normal((4000, 16)).astype('f4')\n"
        "for threads in (1, 2):\n"
        "    torch.set_num_threads(threads); faiss.omp_set_num_threads(threads)\n"
        "    index = faiss.index_factory(16, 'IVF16,Flat'); index.train(x); index.add(x)\n"
        "    assert (index.search(x[:9], 1)[1][:, 0] == np.arange(9)).all()\n"
        "    layer = torch.nn.Linear(16, 16); layer(torch.from_numpy(x)).sum().backward()\n"
        "    assert len(torch.arange(40_000)) == 40_000\n"
        "print('well')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "well\n"), done.stderr
