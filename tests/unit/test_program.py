"""What programs say of errors: once, whichever of a torchrun's processes finds them."""

import subprocess
import sys
from pathlib import Path

import pytest

from tml import program, torchrun
from tml.machines import environment


def test_what_is_wrong_for_all_processes_is_said_once(tmp_path: Path) -> None:
    script = tmp_path / "wrong.py"
    script.write_text(
        "import os, sys, tempfile\n"
        "from tml import program\n"
        "rank = int(os.environ['RANK'])\n"
        "program.fail('the same for all')\n"
        "program.fail(f'of {rank} alone')\n"
        "print(os.environ['TML_SAID'])\n"
        "sys.exit(2)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "tml.torchrun", "--nproc_per_node", "2", str(script)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert sorted(done.stderr.splitlines()) in (
        ["error: of 0 alone", "error: of 1 alone", "error: the same for all"],
        # torchrun ends the other as soon as the first has failed.
        ["error: of 0 alone", "error: the same for all"],
        ["error: of 1 alone", "error: the same for all"],
    )
    assert not any(Path(folder).exists() for folder in done.stdout.split())


def test_nothing_is_left_where_nothing_is_wrong_or_a_signal_comes_early(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with torchrun._errors_said_once():
        folder = Path(environment.get(environment.TML_SAID) or "")
        assert not folder.exists()
        program.fail("wrong")
        assert [note.read_text() for note in folder.iterdir()] == ["said"]
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()
    assert capsys.readouterr().err == "error: wrong\n"


def test_what_another_process_began_to_say_and_did_not_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "PATIENCE_S", 0.05)
    for folder in (tmp_path, tmp_path / "gone"):
        monkeypatch.setenv(environment.TML_SAID, str(folder))
        assert program.fail("wrong") == 2
        assert capsys.readouterr().err == "error: wrong\n"
    monkeypatch.setenv(environment.TML_SAID, str(tmp_path))
    assert program.fail("wrong") == 2
    assert capsys.readouterr().err == ""
    (note,) = (path for path in tmp_path.iterdir() if path.is_file())
    note.write_text("")  # killed before it could
    assert program.fail("wrong") == 2
    assert capsys.readouterr().err == "error: wrong\n"
