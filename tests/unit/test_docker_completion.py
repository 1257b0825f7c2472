"""Completion, asked as the shells ask: in a real bash, and in zsh and fish where they are
installed.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tml.docker import completion, records
from tml.machines import environment

REPOSITORY = Path(__file__).resolve().parents[2]

# What bash does at a Tab, for the line in $1: words, the registered function, its answers.
ASK_BASH = r"""
source "$2"
COMP_LINE=$1 COMP_POINT=${#1} COMP_TYPE=9
read -ra COMP_WORDS <<<"$1"
[[ $1 != *" " ]] || COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
function=$(complete -p "${COMP_WORDS[0]##*/}" | sed 's/.* -F \([^ ]*\) .*/\1/')
"$function" "${COMP_WORDS[0]}" "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}" 2>/dev/null
printf '%s\n' "${COMPREPLY[@]% }"
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """The code for bash, in a file."""
    file = tmp_path / "tml.bash"
    file.write_text(completion.shell_code("bash", sys.executable, REPOSITORY))
    return file


def ask(code: Path, line: str, script: str = ASK_BASH, **env: str) -> list[str]:
    """The words that bash would offer, asked from another folder than the checkout's."""
    done = subprocess.run(
        ["bash", "-c", script, "bash", line, str(code)],
        cwd=code.parent,
        env={**os.environ, environment.DOCKER_HOST: "unix:///nothing", **env},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("tml ru", ["run"]),
        ("tml co", ["compose-env", "completion"]),
        ("tml run ", ["recap", "twhin"]),
        ("tml run re", ["recap"]),
        ("tml run --no", ["--no-build"]),
        ("tml up --workers 2 --eval", ["--evaluator"]),
        ("tml run --shm-size 5", ["512m"]),
        ("tml up --config-mount ", ["ro", "rw", "none"]),
        ("tml exec --role ", ["chief", "worker-1"]),
        ("tml completion ", ["bash", "zsh", "fish"]),
        ("python -m tml.docker st", ["stop"]),
        ("python3 -m tml.docker run re", ["recap"]),
        (".venv/bin/python -m tml.docker run re", ["recap"]),
        ("python -c tml.docker st", []),
        ("tml run --nosuch", []),
        ("tml run -- --no", []),
        ("tml run recap -- ", []),
        ("tml exec -- --ro", []),
        ("python -m tml.docker up -- --eval", []),
    ],
)
def test_bash_is_offered_what_fits(code: Path, line: str, words: list[str]) -> None:
    assert ask(code, line) == words


def test_files_are_offered_where_a_file_is_wanted(code: Path) -> None:
    (code.parent / "graph").mkdir()
    (code.parent / "graph.txt").touch()
    assert ask(code, "tml run --data gr") == ["graph/"]
    assert sorted(ask(code, "tml compose-env --output gr")) == ["graph.txt", "graph/"]


def test_variables_are_offered_by_name(code: Path) -> None:
    assert ask(code, "tml run --env TML_PLAN", TML_PLANTED="hidden") == ["TML_PLANTED"]


def test_jobs_that_have_ended_are_offered_to_logs_and_not_to_stop(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(environment.XDG_STATE_HOME, str(tmp_path))
    record = records.Record(
        job="tml-twhin-1a2b",
        run_id="1a2b",
        verb="up",
        project="twhin",
        owner="x:1:2:3",
        endpoint="unix:///nothing",
        members=("chief", "worker-1", "worker-2"),
        logs=None,
        started=1.0,
    )
    records.write(record)
    assert ask(code, "tml logs ") == ["tml-twhin-1a2b"]
    assert ask(code, "tml stop ") == []
    assert ask(code, "tml logs tml-twhin-1a2b --role w") == ["worker-1", "worker-2"]


def test_the_function_is_this_checkouts_launcher_wherever_it_is_called(
    code: Path, tmp_path: Path
) -> None:
    # A package of that name lies in the folder that one happens to be in.
    (tmp_path / "tml" / "docker").mkdir(parents=True)
    for folder in ("tml", "tml/docker"):
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "tml" / "docker" / "__main__.py").write_text("print('another')\n")
    said = ask(code, "", 'source "$2"; tml --help | grep "VERB \\.\\.\\."')
    assert said == ["usage:", "python", "-m", "tml.docker", "[-h]", "VERB", "..."]


def test_what_completed_python_before_still_does(code: Path) -> None:
    before = "mine() { COMPREPLY=(before); }; complete -o default -F mine python\n"
    assert ask(code, "python -m other st", before + ASK_BASH) == ["before"]
    assert ask(code, "python -m tml.docker st", before + ASK_BASH) == ["stop"]
    # Read twice, as by a shell in a shell's start-up files.
    assert ask(code, "python -m other st", before + 'source "$2"\n' + ASK_BASH) == ["before"]


def test_it_answers_fast_and_silently_where_no_engine_answers(code: Path) -> None:
    fastest = min(_seconds(code) for _ in range(3))
    assert fastest < 2.0  # 0.3 s on an idle machine; the tests' may be busy


def _seconds(code: Path) -> float:
    start = time.perf_counter()
    ask(code, "tml stop ")
    return time.perf_counter() - start


def test_a_path_with_a_space_and_a_quote_survives(tmp_path: Path) -> None:
    checkout = tmp_path / "it's mine"
    checkout.mkdir()
    (checkout / "tml").symlink_to(REPOSITORY / "tml")
    (checkout / "projects").symlink_to(REPOSITORY / "projects")
    file = tmp_path / "code"
    file.write_text(completion.shell_code("bash", sys.executable, checkout))
    assert ask(file, "tml run re") == ["recap"]


def test_argcomplete_is_imported_only_when_a_shell_asks() -> None:
    program = "import sys, tml.docker.__main__, tml.docker.completion; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert "argcomplete" not in done.stdout.split()


@pytest.mark.skipif(not shutil.which("fish"), reason="fish is not installed")
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("tml run re", ["recap"]),
        ("tml run --no", ["--no-build"]),
        ("python -m tml.docker sto", ["stop"]),
        (".venv/bin/python -m tml.docker run re", ["recap"]),
    ],
)
def test_fish_is_offered_what_fits(tmp_path: Path, line: str, words: list[str]) -> None:
    file = tmp_path / "tml.fish"
    file.write_text(completion.shell_code("fish", sys.executable, REPOSITORY))
    done = subprocess.run(
        ["fish", "-c", f"source {file}; complete -C '{line}'"],
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stderr, [row.split("\t")[0] for row in done.stdout.splitlines()]) == ("", words)


# zsh completes only on a terminal: one is made, a line and a Tab are typed, and what the shell
# made of them is read.
ASK_ZSH = r"""
zmodload zsh/zpty zsh/zselect
zpty -b shell zsh -f -i
zpty -w shell 'PS1=""; unsetopt beep; source '$2'; print RE""ADY'
seen=
until [[ $seen == *READY* ]]; do zselect -t 5; zpty -rt shell out && seen+=$out; done
zpty -w -n shell "$1"$'\t'
seen=
repeat 200; do zselect -t 5; zpty -rt shell out && seen+=$out; [[ $seen != *$3* ]] || break; done
print -r -- $seen
"""


@pytest.mark.skipif(not shutil.which("zsh"), reason="zsh is not installed")
@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("tml run re", "recap"),
        ("tml run --no", "--no-build"),
        ("python -m tml.docker sto", "stop"),
    ],
)
def test_zsh_is_offered_what_fits(tmp_path: Path, line: str, completed: str) -> None:
    file = tmp_path / "tml.zsh"
    file.write_text(completion.shell_code("zsh", sys.executable, REPOSITORY))
    done = subprocess.run(
        ["zsh", "-f", "-c", ASK_ZSH, "zsh", line, str(file), completed],
        env={**os.environ, "HOME": str(tmp_path), "TERM": "dumb"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert completed in done.stdout
