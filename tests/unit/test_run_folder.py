"""The run folder: files that are whole or absent."""

import json
from pathlib import Path

import pytest

from tml import run_folder


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    run_folder.write_json(tmp_path / "a.json", {"step": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"step": 1}
    (tmp_path / "b.json").mkdir()
    with pytest.raises(OSError, match="directory"):
        run_folder.write_json(tmp_path / "b.json", {"step": 1})
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "b.json"}
