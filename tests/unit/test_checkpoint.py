"""Step folders: complete or not counted, atomic, refusing another model."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tml import checkpoint
from tml.checkpoint import CheckpointError


def state(value: float = 0.0) -> dict[str, torch.Tensor]:
    return {
        "tables.user.weight": torch.full((4, 2), value),
        "translations": torch.full((3, 2), -value),
    }


def test_what_is_saved_is_loaded_with_its_meta_and_config(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 7, state(1.5), {"world_size": 1}, "a: 1\n")
    folder = tmp_path / "7"
    assert checkpoint.complete_steps(tmp_path) == [7]
    assert checkpoint.load_meta(folder) == {"world_size": 1, "step": 7}
    assert (folder / "config.yaml").read_text() == "a: 1\n"
    loaded = state()
    weight = loaded["tables.user.weight"]
    checkpoint.load(folder, loaded)
    assert weight.equal(torch.full((4, 2), 1.5)), "loading is in place"
    whole = checkpoint.load_whole(folder, ["tables.user.weight"])
    assert list(whole) == ["tables.user.weight"]


def test_saved_names_are_a_promise(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state(), {}, "")
    assert {path.name for path in (tmp_path / "1").iterdir()} >= {
        "meta.json",
        "config.yaml",
        "COMPLETE",
    }
    assert sorted(checkpoint.load_whole(tmp_path / "1")) == ["tables.user.weight", "translations"]


def test_a_folder_without_complete_does_not_count_and_is_replaced(tmp_path: Path) -> None:
    for step in (5, 9):
        checkpoint.save(tmp_path, step, state(step), {}, "")
    (tmp_path / "9" / "COMPLETE").unlink()
    assert checkpoint.complete_steps(tmp_path) == [5]
    with pytest.raises(CheckpointError, match="not complete"):
        checkpoint.load_meta(tmp_path / "9")
    checkpoint.save(tmp_path, 9, state(9.0), {}, "")
    assert checkpoint.complete_steps(tmp_path) == [5, 9]


def test_complete_is_written_after_everything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    original = checkpoint._write_synced

    def note(path: Path, text: str) -> None:
        written.append(path.name)
        assert any(p.suffix == ".distcp" for p in path.parent.iterdir()), "tensors come first"
        original(path, text)

    monkeypatch.setattr(checkpoint, "_write_synced", note)
    checkpoint.save(tmp_path, 1, state(), {}, "")
    assert written[-1] == "COMPLETE"
    assert len(written) == 3


def test_only_the_newest_are_kept_and_leftovers_go(tmp_path: Path) -> None:
    (tmp_path / "2").mkdir()  # what a killed run left behind
    (tmp_path / "notes").mkdir()
    for step in (1, 3, 10, 20):
        checkpoint.save(tmp_path, step, state(step), {}, "", keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "20", "notes"]


def test_a_numbered_folder_of_somebody_else_is_never_removed(tmp_path: Path) -> None:
    for name in ("5", "7"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "photos.txt").write_text("mine")
    checkpoint.save(tmp_path, 6, state(), {}, "", keep=1)
    with pytest.raises(CheckpointError, match=r"7 is in the way and holds something else"):
        checkpoint.save(tmp_path, 7, state(), {}, "", keep=1)
    assert all((tmp_path / name / "photos.txt").exists() for name in ("5", "7"))
    assert checkpoint.complete_steps(tmp_path) == [6]


def test_another_model_is_refused_with_both_shapes(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state(), {}, "")
    with pytest.raises(CheckpointError, match=r"shape \(4, 2\), the model's is \(5, 2\)"):
        checkpoint.load(tmp_path / "1", {"tables.user.weight": torch.zeros(5, 2)})
    with pytest.raises(CheckpointError, match=r"has no tables\.tweet\.weight; it has"):
        checkpoint.load(tmp_path / "1", {"tables.tweet.weight": torch.zeros(4, 2)})


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state(), {}, "")
    (tensors,) = (tmp_path / "1").glob("*.distcp")
    tensors.write_bytes(tensors.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"checkpoint .*/1 cannot be read"):
        checkpoint.load(tmp_path / "1", state())
    (tmp_path / "1" / "meta.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"meta\.json cannot be read"):
        checkpoint.load_meta(tmp_path / "1")


def test_a_full_disk_is_named_and_leaves_the_last_checkpoint_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, 1, state(1.0), {}, "", keep=1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(CheckpointError, match=r"no space left.*last complete checkpoint is .*/1"):
        checkpoint.save(tmp_path, 2, state(2.0), {}, "", keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    json.loads((tmp_path / "1" / "meta.json").read_text())


def test_a_protected_step_stays_beside_the_newest_until_another_one_is(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        checkpoint.save(tmp_path, step, state(step), {}, "", keep=1, protect=[20])
    assert checkpoint.complete_steps(tmp_path) == [20, 40]
    assert checkpoint.load_whole(tmp_path / "20")["translations"].eq(-20).all()
    checkpoint.remove_old(tmp_path, keep=1, protect=[40])
    assert checkpoint.complete_steps(tmp_path) == [40]
    checkpoint.remove_old(tmp_path, keep=None)
    assert checkpoint.complete_steps(tmp_path) == [40]


def test_a_folder_that_the_trainer_removes_while_steps_are_listed_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (3, 4):
        (tmp_path / str(step)).mkdir()
        (tmp_path / str(step) / checkpoint.COMPLETE).touch()
    is_ours = checkpoint.is_ours

    def removed_just_now(folder: Path) -> bool:
        if folder.name == "3":
            shutil.rmtree(folder)
        return is_ours(folder)

    monkeypatch.setattr(checkpoint, "is_ours", removed_just_now)
    assert checkpoint.complete_steps(tmp_path) == [4]
    # While it is looked into: the folder is there, and a moment later it is not.
    monkeypatch.setattr(Path, "is_dir", lambda _: True)
    assert not is_ours(tmp_path / "3")
