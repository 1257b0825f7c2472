"""The verbs and their flags: every verb can be asked for help and can be carried out, and mistakes
are told with what was likely meant.
"""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from tml.docker import flags

REPOSITORY = Path(__file__).resolve().parents[2]
VERBS = flags._parsers(flags.build_parser())


def help_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        flags.parse([*argv, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        flags.parse(list(argv))
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_a_terminal_and_has_an_example(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(capsys, verb)
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert f"python -m tml.docker {verb}" in text
    assert "examples:" in text or verb == "ping"


def test_the_main_help_names_every_verb(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(capsys)
    assert [line for line in text.splitlines() if len(line) > 80] == []
    for verb in VERBS:
        assert f" {verb} " in text


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_says_what_it_does(verb: str) -> None:
    silent = [action.dest for action in VERBS[verb]._actions if not action.help]
    assert silent in ([], ["shell"])  # completion's own argument names its choices


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_can_be_carried_out(verb: str) -> None:
    module, _, function = VERBS[verb].get_default("function").partition(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("verb", VERBS)
def test_examples_are_flags_that_there_are(verb: str) -> None:
    parser = VERBS[verb]
    lines = [line.strip() for line in (parser.epilog or "").splitlines()]
    prefix = f"python -m tml.docker {verb}"
    examples = [line.removeprefix(".venv/bin/").removeprefix(prefix) for line in lines]
    for example, line in zip(examples, lines, strict=True):
        if line.startswith((prefix, ".venv/bin/" + prefix)):
            # What explains it stands two spaces away; && begins another command, > a file.
            words = example.split("  ")[0].split("&&")[0].split(">")[0].split("|")[0].split()
            flags.parse([verb, *words])


def test_a_mistyped_verb_is_answered_with_the_one_that_was_meant(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "no verb 'rum'; did you mean run?" in refusal(capsys, "rum")
    assert "there are: run, up, " in refusal(capsys, "zzz")


def test_a_mistyped_flag_is_answered_with_the_one_that_was_meant(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = refusal(capsys, "up", "--worker", "3")
    assert "up does not know --worker; did you mean --workers?" in said
    assert "python -m tml.docker up --help" in said


def test_flags_of_the_program_are_sent_behind_the_dashes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for flag in ("--max_steps=3", "--set", "--save_dir", "--config_path=x", "--config"):
        said = refusal(capsys, "run", flag, "x=1")
        name = flag.partition("=")[0]
        assert "flags of the program go after --, as in" in said
        assert f"python -m tml.docker run -- {name} …" in said
        assert "did you mean" not in said
    assert "what is meant for the program stands after --" in refusal(capsys, "up", "--zzz")
    assert "after --" not in refusal(capsys, "ps", "--max_steps=3")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--config-moun", "--config-mount"),
        ("--nproc_per_node", "--nproc-per-node"),
        ("--shm_size=1g", "--shm-size"),
    ],
)
def test_flags_of_the_launcher_that_look_like_the_programs_are_known(
    typed: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"did you mean {meant}?" in refusal(capsys, "run", typed)


@pytest.mark.parametrize("typed", ["--workers", "--wrokers", "--worker=2"])
def test_run_sends_who_wants_workers_to_up(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "; up has --workers\n" in refusal(capsys, "run", typed)
    assert "up has" not in refusal(capsys, "shell", typed)


def test_the_help_says_what_a_port_and_an_exec_need(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert "run needs --network bridge" in help_of(capsys, "run")
    assert "without one, a shell" in help_of(capsys, "exec")


def test_what_takes_nothing_after_the_dashes_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert "ps takes nothing after --" in refusal(capsys, "ps", "--", "x")


def test_no_verb_at_all_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert "python -m tml.docker run" in refusal(capsys)


def test_what_stands_behind_the_dashes_is_not_looked_at() -> None:
    parsed, args = flags.parse(["run", "recap", "--", "--gpus", "--", "x"])
    assert (parsed.project, parsed.gpus, args) == ("recap", None, ["--gpus", "--", "x"])


def test_flags_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--detach" in refusal(capsys, "run", "--det")


def test_help_needs_neither_docker_py_nor_an_engine() -> None:
    program = "import sys; sys.modules['docker'] = None; import tml.docker.__main__ as m; m.main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "run", "--help"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        env={"DOCKER_HOST": "unix:///nothing", "PATH": ""},
    )
    assert (done.returncode, done.stderr) == (0, "")
