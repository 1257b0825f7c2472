"""Edge lists → training data: what is written for small files, and what is said about bad ones."""

import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from projects.twhin import prepare
from projects.twhin.config import TwhinConfig
from projects.twhin.prepare import Options, Relation
from tml.config import load_config
from tml.data.folders import FolderBusyError, FolderError, new_folder

ROOT = Path(__file__).parents[2]
LIKE = Relation("like", "user", "video")
EDGES = "u1\tlike\tv1\nu1\tlike\tv2\nu2\tlike\tv1\nu3\tfollow\tu1\n"
BOTH = ["--relation=like=user:video", "--relation=follow=user:user"]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        data = content.encode() if isinstance(content, str) else content
        if name.endswith(".gz") and not data.startswith(b"\x1f\x8b"):
            data = gzip.compress(data)
        path.write_bytes(data)
        return path

    return write_file


Write = Callable[[str, str | bytes], Path]


def run(*arguments: object) -> int:
    return prepare.main([str(argument) for argument in arguments])


def names_of(folder: Path, kind: str) -> list[str]:
    table = pq.read_table(folder / "vocab" / f"{kind}.parquet")
    assert table["id"].to_pylist() == list(range(table.num_rows))
    return list(table["entity"].to_pylist())


def edges_of(folder: Path, split: str) -> list[tuple[str, str, str]]:
    """The edges of a split by name, sorted."""
    config = load_config(TwhinConfig, _config(folder), base=folder / "graph.yaml")
    names = {t.name: names_of(folder, t.name) for t in config.model.embeddings.tables}
    table = pq.read_table(folder / split, columns=["lhs", "rel", "rhs"])
    assert {str(field.type) for field in table.schema} == {"int64"}
    found = []
    for lhs, rel, rhs in zip(*(column.to_pylist() for column in table.columns), strict=True):
        relation = config.model.relations[rel]
        found.append((names[relation.lhs][lhs], relation.name, names[relation.rhs][rhs]))
    return sorted(found)


def _config(folder: Path) -> Path:
    path = folder.with_name("config.yaml")
    path.write_text(
        "model: {embeddings: {defaults: {embedding_dim: 4}}}\ntrain_data: {global_negatives: 9}"
    )
    return path


def counts_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "counts.json").read_text()))


# What is written


@pytest.mark.parametrize("name", ["edges.tsv", "edges.tsv.gz"])
def test_edges_of_two_relations(write: Write, tmp_path: Path, name: str) -> None:
    output = tmp_path / "out"
    assert run("--train", write(name, EDGES), "--output", output, *BOTH) == 0
    assert edges_of(output, "train") == sorted(
        tuple(line.split("\t")) for line in EDGES.split("\n")[:-1]
    )
    # By training edges (u1 three, follow's right side included), then by name.
    assert names_of(output, "user") == ["u1", "u2", "u3"]
    assert names_of(output, "video") == ["v1", "v2"]
    counts = counts_of(output)
    assert counts["relations"] == {"like": {"train": 3}, "follow": {"train": 1}}
    assert counts["entities"]["user"] == {"all": 3, "unseen_in_train": 0}
    assert sorted(path.name for path in output.iterdir()) == [
        "counts.json", "graph.yaml", "train", "vocab",
    ]  # fmt: skip


def test_graph_yaml_is_laid_under_a_config(write: Write, tmp_path: Path) -> None:
    output = tmp_path / "out"
    train, test = write("a.tsv", EDGES), write("b.tsv", "u9\tlike\tv1\n")
    assert run("--train", train, "--test", test, "--output", output, *BOTH) == 0
    config = load_config(TwhinConfig, _config(output), base=output / "graph.yaml")
    tables = {table.name: table for table in config.model.embeddings.tables}
    assert tables["user"].num_embeddings == 4
    assert tables["user"].vocab == f"{output}/vocab/user.parquet"
    assert [(r.name, r.lhs, r.rhs) for r in config.model.relations] == [
        ("like", "user", "video"),
        ("follow", "user", "user"),
    ]
    assert config.train_data.data_root == f"{output}/train/*.parquet"
    assert config.test_data is not None
    assert config.test_data.data_root == f"{output}/test/*.parquet"
    assert config.validation_data is None


def test_names_that_mean_something_in_yaml_or_to_the_loader(write: Write, tmp_path: Path) -> None:
    output = tmp_path / "out"
    train = write("a.tsv", "a\t${HOME}: [$x]\tb\n'\"c\t007\tb\n")
    assert run("--train", train, "--output", output, "--entity-type", "entity") == 0
    assert edges_of(output, "train") == [("'\"c", "007", "b"), ("a", "${HOME}: [$x]", "b")]


def test_ids_that_look_like_numbers_stay_text(write: Write, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert (
        run(
            "--train",
            write("a.tsv", "007\tr\t7\n7\tr\tNA\n"),
            "--output",
            output,
            "--entity-type=e",
        )
        == 0
    )
    assert sorted(names_of(output, "e")) == ["007", "7", "NA"]


def test_entities_unseen_in_training_are_kept_last_and_counted(
    write: Write, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    train, valid, test = (
        write("train.tsv", "b\tr\tc\nb\tr\td\n"),
        write("valid.tsv", "b\tr\ta\nb\tr\tc\n"),
        write("test.tsv", "z\tr\ty\nb\tr\ty\n"),
    )
    files = ["--train", train, "--valid", valid, "--test", test]
    assert run(*files, "--output", output, "--entity-type", "entity") == 0
    assert names_of(output, "entity") == ["b", "c", "d", "a", "y", "z"]
    counts = counts_of(output)
    assert counts["entities"]["entity"] == {"all": 6, "unseen_in_train": 3}
    assert counts["edges_with_unseen_entity"] == {"valid": 1, "test": 2}
    assert counts["edges_also_in_train"] == {"valid": 1, "test": 0}
    assert counts["edges"] == {"train": 2, "valid": 2, "test": 2}


def test_relations_found_in_the_data_go_by_frequency(write: Write, tmp_path: Path) -> None:
    output = tmp_path / "out"
    train, test = write("a.tsv", "a\tx\tb\na\ty\tb\nb\ty\ta\n"), write("b.tsv", "a\tw\tb\n" * 5)
    files = ["--train", train, "--test", test]
    assert run(*files, "--output", output, "--entity-type", "entity") == 0
    assert list(counts_of(output)["relations"]) == ["y", "x", "w"]
    assert run(*files, "--output", output, "--entity-type=e", "--only=x", "--overwrite") == 2
    assert (
        run("--train", train, "--output", output, "--entity-type=e", "--only=x", "--overwrite") == 0
    )
    assert edges_of(output, "train") == [("a", "x", "b")]


def test_duplicates_are_dropped_within_a_split_or_kept(write: Write, tmp_path: Path) -> None:
    output = tmp_path / "out"
    train = write("a.tsv", "a\tr\tb\na\tr\tb\nb\tr\ta\n")
    assert run("--train", train, "--output", output, "--entity-type", "e") == 0
    assert edges_of(output, "train") == [("a", "r", "b"), ("b", "r", "a")]
    assert counts_of(output)["dropped"]["duplicates"] == {"train": 1}
    again = ["--train", train, "--output", output, "--entity-type", "e", "--overwrite"]
    assert run(*again, "--keep-duplicates") == 0
    assert len(edges_of(output, "train")) == 3


def test_rows_are_in_a_random_order_that_the_seed_gives(write: Write, tmp_path: Path) -> None:
    train = write("a.tsv", "".join(f"u{i:04}\tr\tv{i:04}\n" for i in range(1000)))
    orders = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        output = tmp_path / name
        assert run("--train", train, "--output", output, "--relation=r=u:v", "--seed", seed) == 0
        orders.append(pq.read_table(output / "train")["lhs"].to_pylist())
    assert orders[0] == orders[1] != orders[2]
    assert abs(np.corrcoef(orders[0], range(1000))[0, 1]) < 0.2
    assert sorted(orders[0]) == list(range(1000))


def test_row_groups_and_parts_have_their_size(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "ROW_GROUP_ROWS", 8)
    monkeypatch.setattr(prepare, "PART_ROWS", 20)
    train = write("a.tsv", "".join(f"u{i}\tr\tv{i}\n" for i in range(50)))
    assert run("--train", train, "--output", tmp_path / "out", "--relation=r=u:v") == 0
    parts = sorted((tmp_path / "out" / "train").iterdir())
    assert [path.name for path in parts] == [f"part-0000{i}.parquet" for i in range(3)]
    assert [pq.ParquetFile(path).metadata.num_rows for path in parts] == [20, 20, 10]
    first = pq.ParquetFile(parts[0]).metadata
    assert [first.row_group(i).num_rows for i in range(3)] == [8, 8, 4]
    assert len(edges_of(tmp_path / "out", "train")) == 50


# Formats


@pytest.mark.parametrize("name", ["lines.txt", "lines.txt.gz"])
def test_adjacency_lines(write: Write, tmp_path: Path, name: str) -> None:
    output = tmp_path / "out"
    train = write(name, "0 5 6\n1 5\n\n2\n3\t7  6 \r\n")
    settings = ["--format", "adjacency", "--relation", "buys=user:item"]
    assert run("--train", train, "--output", output, *settings) == 0
    found = [(user, item) for user, _, item in edges_of(output, "train")]
    assert found == [("0", "5"), ("0", "6"), ("1", "5"), ("3", "6"), ("3", "7")]


def test_csv_with_a_header_quotes_and_other_columns(write: Write, tmp_path: Path) -> None:
    output = tmp_path / "out"
    train = write("a.csv", 'when,item,what,who\n1,"v,1",like,u1\n2,v2,like,u2\n')
    settings = ["--header", "--columns", "who,what,item", "--relation", "like=user:video"]
    assert run("--train", train, "--output", output, *settings) == 0
    assert edges_of(output, "train") == [("u1", "like", "v,1"), ("u2", "like", "v2")]


def test_columns_by_number_and_a_file_without_relations(write: Write, tmp_path: Path) -> None:
    output = tmp_path / "out"
    train = write("a.tsv", "v1\tx\tu1\nv2\ty\tu2\n")
    settings = ["--columns", "3,1", "--relation", "like=user:video"]
    assert run("--train", train, "--output", output, *settings) == 0
    assert edges_of(output, "train") == [("u1", "like", "v1"), ("u2", "like", "v2")]


def test_parquet_with_integer_ids(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pl.DataFrame({"lhs": [3, 4], "rel": ["like", "like"], "rhs": [2**40, 5]}).write_parquet(path)
    assert run("--train", path, "--output", tmp_path / "out", "--relation=like=user:video") == 0
    assert edges_of(tmp_path / "out", "train") == [("3", "like", str(2**40)), ("4", "like", "5")]


def test_several_files_blank_lines_and_windows_line_ends(write: Write, tmp_path: Path) -> None:
    first, second = write("a.tsv", "a\tr\tb\r\n\r\nb\tr\tc"), write("b.tsv.gz", "c\tr\ta\n\n")
    assert run("--train", first, second, "--output", tmp_path / "out", "--entity-type", "e") == 0
    assert edges_of(tmp_path / "out", "train") == [
        ("a", "r", "b"),
        ("b", "r", "c"),
        ("c", "r", "a"),
    ]


def test_relations_from_a_yaml_file(write: Write, tmp_path: Path) -> None:
    relations = write("relations.yaml", "like: user:video\nfollow: user:user\n")
    train = write("a.tsv", EDGES)
    assert run("--train", train, "--output", tmp_path / "out", "--relations", relations) == 0
    assert list(counts_of(tmp_path / "out")["relations"]) == ["like", "follow"]


# Splits


def test_random_split_covers_every_edge_once(write: Write, tmp_path: Path) -> None:
    lines = [f"u{i % 7}\tr\tv{i}\n" for i in range(200)]
    train = write("a.tsv", "".join(lines + lines[:30]))
    output = tmp_path / "out"
    settings = ["--split", "0.8,0.1,0.1", "--relation", "r=u:v"]
    assert run("--train", train, "--output", output, *settings) == 0
    splits = {split: edges_of(output, split) for split in ("train", "valid", "test")}
    assert {split: len(edges) for split, edges in splits.items()} == {
        "train": 160, "valid": 20, "test": 20,
    }  # fmt: skip
    assert sorted(edge for edges in splits.values() for edge in edges) == sorted(
        tuple(x[:-1].split("\t")) for x in lines
    )


def test_split_by_time_keeps_times_together_and_lets_nothing_come_back(
    write: Write, tmp_path: Path
) -> None:
    rows = ["a r b 1", "c r d 9", "c r b 5", "a r d 5", "a r b 9", "b r c 2", "d r a 3"]
    train = write("a.tsv", "".join(row.replace(" ", "\t") + "\n" for row in rows))
    output = tmp_path / "out"
    settings = ["--entity-type=e", "--time-column=4", "--overwrite"]
    assert run("--train", train, "--output", output, *settings, "--split=0.5,0.2,0.3") == 0
    # Sorted times 1 2 3 5 5 9 9; cuts in front of positions 4 and 5: the first 5 and the first 9.
    assert edges_of(output, "train") == [("a", "r", "b"), ("b", "r", "c"), ("d", "r", "a")]
    assert edges_of(output, "valid") == [("a", "r", "d"), ("c", "r", "b")]
    assert edges_of(output, "test") == [("c", "r", "d")]  # a r b was there at 1
    assert counts_of(output)["dropped"]["duplicates"] == {"train": 0, "valid": 0, "test": 1}
    assert run("--train", train, "--output", output, *settings, "--time-cuts=3") == 0
    assert edges_of(output, "train") == [("a", "r", "b"), ("b", "r", "c")]
    assert not (output / "valid").exists()
    assert run("--train", train, "--output", output, *settings, "--split=0.7,0.3,0") == 0
    assert counts_of(output)["edges"] == {"train": 5, "valid": 1}


def test_split_by_dates(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    dates = pl.Series(["2022-04-01", "2022-05-01", "2022-04-30"]).str.to_date()
    frame = pl.DataFrame({"lhs": ["a", "b", "c"], "rhs": ["d", "e", "f"], "day": dates})
    frame.write_parquet(path)
    settings = ["--columns=lhs,rhs", "--relation=r=u:v", "--time-column=day"]
    output = tmp_path / "out"
    assert run("--train", path, "--output", output, *settings, "--time-cuts=2022-04-15") == 0
    assert edges_of(output, "train") == [("a", "r", "d")]
    assert edges_of(output, "test") == [("b", "r", "e"), ("c", "r", "f")]


# What is said about bad input


TRUNCATED = gzip.compress(os.urandom(30_000).hex().encode())[:-5000]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.tsv", "", ["a.tsv", "is empty"]),
        ("a.tsv", "u\tlike\tv\nu\tlike\n", ["line 2", "2 columns in place of 3", "'u\\tlike'"]),
        ("a.tsv", "u\tlike\tv\n\nu\tlike\tv\tw\n", ["line 3", "4 columns in place of 3"]),
        ("a.tsv.gz", "u\tlike\tv\nu\tlike\n", ["line 2", "2 columns in place of 3"]),
        ("a.tsv", "u\tlike\tv\n\tlike\tv\n", ["line 2", "column 1 is empty", "every edge"]),
        ("a.csv", "u,like,v\nu,,v\n", ["line 2", "column 2 is empty"]),
        ("a.tsv", b"u\tlike\tv\nu\tlike\t\xff\n", ["line 2", "UTF-8"]),
        ("a.tsv", "u like v\n", ["1 columns", "--columns"]),
        (
            "a.tsv",
            "u\tlike\tv\nu\tsaw\tv\n",
            ["saw (1 rows)", "--relation", "--drop-other-relations"],
        ),
        ("a.tsv", "u\tsaw\tv\n", ["'like'", "no input has an edge"]),
        ("a.tsv.gz", TRUNCATED, ["a.tsv.gz", "cannot be read"]),
        ("a.parquet", b"PAR1 and then not", ["a.parquet", "cannot be read as parquet"]),
        ("a.txt", "u\tlike\tv\n", ["a.txt", "--format"]),
    ],
)
def test_bad_files_are_one_clear_error_and_leave_nothing(
    write: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: str | bytes,
    words: list[str],
) -> None:
    path = write(name, content)
    assert run("--train", path, "--output", tmp_path / "out", "--relation=like=user:video") == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert len(message.splitlines()) == 1
    for word in words:
        assert word in message
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--train", "absent.tsv", "--entity-type=e"], ["absent.tsv", "no such file"]),
        (["--relation=like"], ["NAME=LHS_TYPE:RHS_TYPE"]),
        (["--relation=like=user:a/b"], ["'a/b'"]),
        ([], ["--relation", "--entity-type"]),
        (["--relation=like=u:v", "--relation=like=u:w"], ["declared twice"]),
        (["--entity-type=e", "--split=0.9,0.2,0.1"], ["0.9,0.2,0.1", "add up to 1"]),
        (["--entity-type=e", "--split=0.9,0.1"], ["train, valid and test"]),
        (["--entity-type=e", "--time-column=3"], ["--split or --time-cuts"]),
        (["--entity-type=e", "--time-cuts=3"], ["--time-column"]),
        (["--entity-type=e", "--time-column=2", "--time-cuts=3"], ["no edge falls into"]),
        (["--entity-type=e", "--time-column=9", "--time-cuts=3"], ["no column '9'"]),
        (["--entity-type=e", "--columns=a,b,c"], ["no column 'a'", "numbers from 1"]),
        (["--entity-type=e", "--columns=1"], ["--columns 1"]),
        (["--entity-type=e", "--columns=1,2"], ["exactly one --relation"]),
        (["--entity-type=e", "--only=absent"], ["'absent'", "there are like, follow"]),
        (["--entity-type=e", "--split=0.9,0.05,0.05"], ["too few", "valid"]),
    ],
)
def test_bad_flags_are_one_clear_error(
    write: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    words: list[str],
) -> None:
    path = write("a.tsv", EDGES)
    assert run("--train", path, "--output", tmp_path / "out", *flags) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    for word in words:
        assert word in message
    assert [file.name for file in tmp_path.iterdir()] == ["a.tsv"]


def test_null_and_fractional_ids_in_parquet_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.parquet"
    frame = pl.DataFrame({"lhs": [1, None], "rel": ["like"] * 2, "rhs": [1, 2]})
    frame.write_parquet(path)
    assert run("--train", path, "--output", tmp_path / "out", "--entity-type=e") == 2
    assert "row 1 (from 0): lhs is empty" in capsys.readouterr().err
    frame.with_columns(pl.col("lhs").cast(pl.Float64)).write_parquet(path)
    assert run("--train", path, "--output", tmp_path / "out", "--entity-type=e") == 2
    assert "Float64; ids must be integers or strings" in capsys.readouterr().err
    assert (
        run("--train", path, "--output", tmp_path / "out", "--entity-type=e", "--columns=a,b,c")
        == 2
    )
    assert "no column 'a'; it has lhs, rel, rhs" in capsys.readouterr().err


def test_times_that_are_half_numbers_are_refused(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write("a.tsv", "a\tr\tb\t5\na\tr\tc\tnoon\n")
    settings = ["--entity-type=e", "--time-column=4", "--time-cuts=7"]
    assert run("--train", path, "--output", tmp_path / "out", *settings) == 2
    assert "'noon' is not a number" in capsys.readouterr().err


# The output folder


def test_a_full_output_folder_is_refused_and_replaced_only_when_asked(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("three years")
    command = ["--train", write("a.tsv", EDGES), "--output", output, *BOTH]
    assert run(*command) == 2
    assert "not empty" in capsys.readouterr().err
    bad = ["--train", write("b.tsv", "u\tlike\n"), "--output", output, *BOTH, "--overwrite"]
    assert run(*bad) == 2
    assert run(*command, "--overwrite") == 2
    assert "holds something else" in capsys.readouterr().err
    assert (output / "thesis.txt").exists(), "only prepared edges are overwritten"
    (output / "counts.json").write_text("{}")
    assert run(*bad) == 2
    assert (output / "thesis.txt").exists(), "a run that fails must not cost the old output"
    assert run(*command, "--overwrite") == 0
    assert not (output / "thesis.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tsv", "b.tsv", "out"]


def test_a_folder_that_another_process_fills_is_left_to_it(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out", "marker") as partial:
        (partial / "file").touch()
        with (
            pytest.raises(FolderBusyError, match="another process"),
            new_folder(tmp_path / "out", "marker"),
        ):
            pass
        assert (partial / "file").exists()
    assert (tmp_path / "out" / "file").exists()


def test_a_file_in_the_place_of_the_output_is_never_overwritten(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = write("thesis.txt", "three years")
    command = ["--train", write("a.tsv", EDGES), "--output", output, *BOTH, "--overwrite"]
    assert run(*command) == 2
    assert "holds something else" in capsys.readouterr().err
    assert output.read_text() == "three years"


def test_what_a_killed_run_left_is_removed_by_the_next(write: Write, tmp_path: Path) -> None:
    left = tmp_path / ".out.partial" / "train"
    left.mkdir(parents=True)
    (left / "part-00009.parquet").touch()
    assert run("--train", write("a.tsv", EDGES), "--output", tmp_path / "out", *BOTH) == 0
    assert [path.name for path in (tmp_path / "out" / "train").iterdir()] == ["part-00000.parquet"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tsv", "out"]


def test_an_output_that_cannot_be_made_is_an_error(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write("a.tsv", EDGES)
    assert run("--train", train, "--output", train / "out", *BOTH) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_full_disk_is_an_error_and_leaves_nothing(write: Write, tmp_path: Path) -> None:
    # A limit on the size of files fails the same write in the same way as a full disk.
    train = write("a.tsv", "".join(f"u{i}\tlike\tv{i * 7919 % 10007}\n" for i in range(20_000)))
    command = [sys.executable, "projects/twhin/prepare.py", "--train", str(train)]
    command += ["--output", str(tmp_path / "out"), "--relation=like=user:video"]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: output {tmp_path}/out cannot be written: ")
    assert "File too large" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.tsv"]


def test_a_stopped_run_leaves_nothing(tmp_path: Path) -> None:
    # Its input never comes: it waits until it is stopped.
    os.mkfifo(tmp_path / "a.tsv")
    code = (
        "import sys; from projects.twhin import prepare; import time\n"
        "prepare.read_edges = lambda *_: (print('reading', flush=True), time.sleep(60))\n"
        "sys.exit(prepare.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "--train", str(tmp_path / "a.tsv")]
    command += ["--output", str(tmp_path / "out"), "--entity-type=e"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    assert (tmp_path / ".out.partial").exists()
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["a.tsv"]


def test_prepare_can_be_called(write: Write, tmp_path: Path) -> None:
    train = write("a.tsv", "u\tlike\tv\n")
    counts = prepare.prepare(Options(tmp_path / "out", [train], relations=[LIKE]))
    assert counts["edges"] == {"train": 1}
    with pytest.raises(FolderError, match="not empty"):
        prepare.prepare(Options(tmp_path / "out", [train], relations=[LIKE]))
