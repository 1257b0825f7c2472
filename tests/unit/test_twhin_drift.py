"""Drift against numbers worked out by hand: equal, scaled, turned and exchanged vectors."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from projects.twhin import drift


def random_rows(num_rows: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(seed))


def test_nothing_has_moved() -> None:
    rows = random_rows(50, 4)
    found = drift.measure(rows, rows.clone())
    assert found["cosine"]["mean"] == pytest.approx(1.0)
    assert found["distance"] == 0
    assert found["neighbors"] == {"k": 10, "entities": 50, "kept": 1.0}
    assert found["rotation"]["share"] == 0


def test_a_turn_of_the_whole_space_is_told_from_change() -> None:
    rows = random_rows(200, 6)
    turn = torch.linalg.qr(random_rows(6, 6, seed=1)).Q
    found = drift.measure(rows, rows @ turn)
    assert found["cosine"]["mean"] < 0.5
    assert found["rotation"]["share"] == pytest.approx(1.0, abs=1e-5)
    assert found["rotation"]["cosine"] == pytest.approx(1.0, abs=1e-5)
    assert found["neighbors"]["kept"] == pytest.approx(1.0, abs=0.01)


def test_a_change_of_length_is_no_turn() -> None:
    rows = random_rows(200, 6)
    found = drift.measure(rows, 3 * rows)
    assert found["cosine"]["mean"] == pytest.approx(1.0)
    assert found["norm"]["new"] == pytest.approx(3 * found["norm"]["old"])
    assert found["distance"] == pytest.approx(2 * found["norm"]["old"])
    assert found["rotation"]["share"] == pytest.approx(0.0, abs=1e-5)


def test_neighbours_cosines_and_distances_by_hand() -> None:
    # Directions at 0°, 10°, 90° and 100°; then the second stands at 85°.
    def at(*degrees: float) -> torch.Tensor:
        angles = torch.tensor(degrees).deg2rad()
        return torch.stack([angles.cos(), angles.sin()], dim=1)

    found = drift.measure(at(0, 10, 90, 100), at(0, 85, 90, 100), k=1)
    # Nearest before: 1, 0, 3, 2. After: 1, 2, 1, 2. Two of four are kept.
    assert found["neighbors"] == {"k": 1, "entities": 4, "kept": 0.5}
    cosine = np.cos(np.deg2rad(75))
    assert found["cosine"]["mean"] == pytest.approx((3 + cosine) / 4, abs=1e-6)
    assert found["cosine"]["p1"] == pytest.approx(cosine, abs=1e-6)
    assert found["cosine"]["p50"] == pytest.approx(1.0, abs=1e-6)
    assert found["distance"] == pytest.approx(2 * np.sin(np.deg2rad(37.5)) / 4, abs=1e-6)


def test_neighbours_are_looked_for_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = random_rows(300, 8), random_rows(300, 8, seed=2) * 0.5 + random_rows(300, 8)
    whole = drift.measure(old, new)["neighbors"]
    monkeypatch.setattr(drift, "BLOCK_SCORES", 900)
    assert drift.measure(old, new)["neighbors"] == whole
    monkeypatch.setattr(drift, "MAX_QUERIES", 100)
    some = drift.measure(old, new)["neighbors"]
    assert some["entities"] == 100
    assert some["kept"] == pytest.approx(whole["kept"], abs=0.1)


def test_few_rows_have_neither_neighbours_nor_a_turn() -> None:
    found = drift.measure(torch.ones(1, 4), torch.ones(1, 4))
    assert found["neighbors"] is None
    assert found["rotation"] is None


def test_more_rows_than_are_measured_are_spread_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "MAX_ROWS", 4)
    assert drift.spread(torch.arange(10)).tolist() == [0, 2, 5, 7]
    assert drift.spread(torch.arange(3)).tolist() == [0, 1, 2]


def write_vectors(folder: Path, entities: list[str], rows: torch.Tensor) -> None:
    folder.mkdir()
    vector = pa.FixedSizeListArray.from_arrays(pa.array(rows.numpy().ravel()), rows.shape[1])
    columns = {"id": np.arange(len(entities)), "entity": entities, "vector": vector}
    pq.write_table(pa.table(columns), folder / "user.parquet")


def test_the_program_matches_entities_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = random_rows(20, 8)
    names = [f"u{number}" for number in range(20)]
    write_vectors(tmp_path / "old", names, rows)
    # The same vectors in another order, two entities gone and one new.
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0)).tolist()
    moved = torch.cat([rows[order], torch.zeros(1, 8)])
    write_vectors(tmp_path / "new", [*(names[row] for row in order), "someone"], moved)
    arguments = [f"--run={tmp_path}/new", f"--previous={tmp_path}/old"]
    assert drift.main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["user"]["matched"] == report["user"]["rows"] == 18
    assert report["user"]["distance"] == 0
    assert drift.main(arguments) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    length = f"{rows[order].norm(dim=1).mean():.3g}"
    assert shown[5] == [
        *("user", "18", "1.000", "1.000", "1.000"),
        *(f"{length}→{length}", "0", "100.0%", "0.0%"),
    ]
    assert drift.main([f"--run={tmp_path}/new"]) == 2
    assert "was not started warm; name the earlier run with" in capsys.readouterr().err
    assert drift.main([f"--run={tmp_path}/new", f"--previous={tmp_path}/x"]) == 2
    assert "--previous: there is no folder" in capsys.readouterr().err
    for more in ([], [f"--previous={tmp_path}/old"]):
        assert drift.main([f"--run={tmp_path}/x", *more]) == 2
        assert "--run: there is no folder" in capsys.readouterr().err
    assert drift.main([*arguments, "--k=0"]) == 2
    assert "--k: 0 is no number of neighbors" in capsys.readouterr().err
    rows[3, 2] = torch.nan
    write_vectors(tmp_path / "spoilt", names, rows)
    assert drift.main([f"--run={tmp_path}/new", f"--previous={tmp_path}/spoilt", "--json"]) == 2
    assert "table 'user', row 3: the vector holds nan" in capsys.readouterr().err


def test_each_heading_is_explained_below_the_table_in_80_columns() -> None:
    old = random_rows(300, 8)
    row = {"matched": 123_456, **drift.measure(old, random_rows(300, 8, seed=1), k=3)}
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(drift.render({"user": row, "long_video": row}))
    lines = [line.rstrip() for line in capture.get().splitlines()]
    assert max(map(len, lines)) <= 80
    table, notes = lines[:7], " ".join(lines[7:])
    for words in ("lowest 1%", "length: mean", "moved:", "nearest kept:", "3 nearest", "turned:"):
        assert words in notes
    assert "123,456" in table[5]
    assert table[6].startswith("long_video  ")  # not folded
