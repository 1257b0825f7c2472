"""run_in_docker.sh of both projects: what its first word may be; and tml.verbs, which refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tml.verbs import refusal

PROJECTS = Path(__file__).parents[2] / "projects"
TWHIN, RECAP = PROJECTS / "twhin", PROJECTS / "home" / "recap"
SCRIPTS = {
    "twhin": (
        TWHIN / "scripts" / "run_in_docker.sh",
        {
            verb: TWHIN / f"{verb}.py"
            for verb in ("prepare", "evaluate", "export", "neighbors", "drift", "mixtures")
        },
        TWHIN / "run.py",
    ),
    "recap": (
        RECAP / "script" / "run_in_docker.sh",
        {
            "create_random_data": RECAP / "script" / "create_random_data.sh",
            "run_local": RECAP / "script" / "run_local.sh",
            "generate_random_data": RECAP / "data" / "generate_random_data.py",
            "prepare": RECAP / "prepare.py",
            "evaluate": RECAP / "evaluate.py",
            "predict": RECAP / "predict.py",
            "export": RECAP / "export.py",
        },
        RECAP / "main.py",
    ),
}
"""Of each project: its script, verb → program, and what trains."""


def run_script(
    script: Path, *arguments: str, home: Path, python: Path = Path(sys.executable).parent
) -> subprocess.CompletedProcess[str]:
    environment = {"HOME": str(home), "PATH": f"{python}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", str(script), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_refusal_names_the_nearest_verb_and_all() -> None:
    verbs = ("prepare", "evaluate")
    assert refusal("evaluat", verbs) == (
        "there is no verb 'evaluat'; did you mean evaluate? verbs: prepare, evaluate; "
        "flags alone train"
    )
    for word in ("xyz", ""):
        assert refusal(word, verbs) == (
            f"there is no verb '{word}'; verbs: prepare, evaluate; flags alone train"
        )


@pytest.mark.parametrize("project", SCRIPTS)
@pytest.mark.parametrize("word", ["exports", ""])
def test_a_first_word_that_is_no_verb_is_refused_in_one_line(
    project: str, word: str, tmp_path: Path
) -> None:
    script, verbs, _ = SCRIPTS[project]
    done = run_script(script, word, "--run=x", home=tmp_path)
    expected = f"error: {refusal(word, list(verbs))}\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """A folder with a `python` that only says what it was asked to run: the programs themselves
    take seconds to load, and have tests of their own.
    """
    program = tmp_path / "bin" / "python"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\n[ "$2" = tml.machines.is_venv ] || echo "$@"\n')
    program.chmod(0o755)
    return program.parent


@pytest.mark.parametrize("project", SCRIPTS)
def test_help_alone_names_the_verbs_before_the_flags_of_training(
    project: str, told: Path, tmp_path: Path
) -> None:
    script, verbs, trains = SCRIPTS[project]
    done = run_script(script, "--help", home=tmp_path, python=told)
    assert (done.returncode, done.stderr) == (0, "")
    listed, _, rest = done.stdout.partition("Flags alone train:\n\n")
    assert [line.split()[0] for line in listed.splitlines()[1:]] == list(verbs)
    assert max(map(len, listed.splitlines())) <= 80
    assert rest == f"{trains} --help\n"
    assert all(program.is_file() for program in (trains, *verbs.values()))


@pytest.mark.parametrize("project", SCRIPTS)
def test_each_verb_runs_its_own_program(project: str, told: Path, tmp_path: Path) -> None:
    script, verbs, _ = SCRIPTS[project]
    for verb, program in verbs.items():
        if program.suffix == ".py":
            done = run_script(script, verb, "--x=a b", home=tmp_path, python=told)
            assert done.stdout == f"{program} --x=a b\n"


@pytest.mark.parametrize("verb", ["create_random_data", "run_local"])
def test_who_asks_a_verb_of_the_ranker_for_help_keeps_his_files(
    verb: str, told: Path, tmp_path: Path
) -> None:
    kept = [tmp_path / "tmp" / "recap_local_random_data", tmp_path / "tmp/runs/recap_local_debug"]
    for flag, is_kept in (("--help", True), ("--seed=1", False)):
        for folder in kept:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "file").touch()
        done = run_script(SCRIPTS["recap"][0], verb, flag, home=tmp_path, python=told)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.endswith(f" {flag}\n")
        assert all((folder / "file").exists() for folder in kept) is is_kept
