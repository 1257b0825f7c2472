"""run_in_docker.sh of TwHIN: what its first word may be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TWHIN = Path(__file__).parents[2] / "projects" / "twhin"
SCRIPT = TWHIN / "scripts" / "run_in_docker.sh"
VERBS = ("prepare", "evaluate", "export", "neighbors", "drift", "mixtures")


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("word", "nearest"), [("evaluat", "did you mean evaluate? "), ("xyz", ""), ("", "")]
)
def test_a_first_word_that_is_no_verb_is_refused_in_one_line(word: str, nearest: str) -> None:
    done = run_script(word, "--run=x")
    expected = (
        f"error: there is no verb '{word}'; {nearest}verbs: {', '.join(VERBS)}; flags alone train\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


def test_help_alone_names_the_verbs_before_the_flags_of_training() -> None:
    done = run_script("--help")
    assert (done.returncode, done.stderr) == (0, "")
    verbs, _, flags = done.stdout.partition("Flags alone train:\n")
    assert tuple(line.split()[0] for line in verbs.splitlines()[1:]) == VERBS
    assert all((TWHIN / f"{verb}.py").is_file() for verb in VERBS)
    assert "--config_yaml_path" in flags
    assert max(map(len, verbs.splitlines())) <= 80
