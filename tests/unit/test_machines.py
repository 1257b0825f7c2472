"""Where a process runs: environment variables, virtual environment, commands for scripts."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tml.machines import environment, get_env, is_venv

REPOSITORY = Path(__file__).resolve().parents[2]
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def test_outside_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*RANKS, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert (environment.rank(), environment.local_rank()) == (0, 0)
    assert (environment.world_size(), environment.local_world_size()) == (1, 1)
    assert not environment.has_master_address()


def test_torchruns_numbers_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(RANKS, start=3):
        monkeypatch.setenv(name, str(number))
    assert (environment.rank(), environment.local_rank()) == (3, 4)
    assert (environment.world_size(), environment.local_world_size()) == (5, 6)


def test_a_number_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ValueError, match="RANK='first'"):
        environment.rank()


def test_the_role_is_chief_unless_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPEC_TYPE", raising=False)
    assert environment.spec_type() == "chief"
    monkeypatch.setenv("SPEC_TYPE", "evaluator")
    assert environment.spec_type() == "evaluator"
    monkeypatch.setenv("SPEC_TYPE", "boss")
    with pytest.raises(ValueError, match=r"SPEC_TYPE='boss'.*chief, worker, datasetworker"):
        environment.spec_type()


def test_the_base_is_this_checkout_unless_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TML_BASE", raising=False)
    assert environment.tml_base() == REPOSITORY
    monkeypatch.setenv("TML_BASE", str(tmp_path))
    assert environment.tml_base() == tmp_path


def test_a_fact_is_printed_and_an_unknown_one_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert get_env.main(["tml_base"]) == 0
    assert capsys.readouterr().out == f"{environment.tml_base()}\n"
    assert get_env.main(["nothing"]) == 2
    assert "tml_base" in capsys.readouterr().err


def test_the_guard_exits_0_inside_and_1_outside(tmp_path: Path) -> None:
    # The interpreter that a virtual environment was made from is the one outside.
    outside = Path(sys.base_prefix) / "bin" / f"python{sysconfig.get_python_version()}"
    inside = tmp_path / "venv" / "bin" / "python"
    subprocess.run([outside, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    for python, status in ((inside, 0), (outside, 1)):
        argv = [python, "-m", "tml.machines.is_venv"]
        assert subprocess.run(argv, cwd=REPOSITORY, check=False).returncode == status
    assert is_venv.is_venv() == (sys.prefix != sys.base_prefix)
