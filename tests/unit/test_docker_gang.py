"""What a gang shows and keeps of its members' output, and who of them failed first. No engine is
needed.
"""

import queue
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tml.docker import output as outputs
from tml.docker.gang import _Attempt, _Member
from tml.docker.output import LONGEST_LINE, Output
from tml.docker.plan import Plan, Variable


def plan(role: Any = "chief", index: int = 0, **secrets: str) -> Plan:
    """A container with these secrets."""
    return Plan(
        image="i",
        command=("c",),
        name="n",
        run_id="1",
        job="j",
        workdir="/",
        env=tuple(Variable(name=k, value=v, secret=True) for k, v in secrets.items()),
        mounts=(),
        network="j",
        user="0:0",
        interactive=False,
        tty=False,
        detach=True,
        role=role,
        index=index,
    )


def make(logs: Path | None, *members: Plan, **options: Any) -> Output:
    """The output of these members."""
    options = {"show": True, "timestamps": False, "on_broken": lambda: None, **options}
    return Output(members, logs=str(logs) if logs else None, **options)


TWO = (plan(), plan("worker", 1))


def test_lines_are_shown_whole_whatever_pieces_they_come_in(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = make(tmp_path, *TWO)
    chief, worker = output.channel("chief"), output.channel("worker-1")
    chief.feed("stdout", b"one\ntw")
    worker.feed("stdout", b"x\n")
    worker.feed("stderr", b"loud\n")
    chief.feed("stdout", b"o\nrest")
    chief.finish()
    assert capfd.readouterr() == (
        "chief    | one\nworker-1 | x\nchief    | two\nchief    | rest\n",
        "worker-1 | loud\n",
    )
    assert (tmp_path / "chief.log").read_text() == "one\ntwo\nrest\n"
    assert list(chief.last_lines) == ["one", "two", "rest"]


def test_secrets_are_stars_wherever_a_line_goes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    members = (plan(TOKEN="abcd", LONGER="abcdef", PIN="123", KEY="first\nsecond"), *TWO[1:])
    output = make(tmp_path, *members)
    channel = output.channel("chief")
    channel.feed("stdout", b"a=ab")
    channel.feed("stdout", b"cd b=abcdef c=123\nsecond\n")
    assert capfd.readouterr().out == "chief    | a=*** b=*** c=123\nchief    | ***\n"
    assert (tmp_path / "chief.log").read_text() == "a=*** b=*** c=123\n***\n"
    assert list(channel.last_lines) == ["a=*** b=*** c=123", "***"]


def test_a_progress_bar_is_shown_as_it_stands_now_and_then(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(outputs.time, "monotonic", lambda: now[0])
    channel = make(tmp_path, *TWO).channel("chief")
    channel.feed("stderr", b"\r 1%")
    channel.feed("stderr", b"\r 2%")
    assert capfd.readouterr().err == ""
    now[0] += outputs.PROGRESS_EVERY_S
    channel.feed("stderr", b"\r 3%")
    assert capfd.readouterr().err == "chief    |  3%\n"
    channel.feed("stderr", b"\r 4%\r\n")
    assert capfd.readouterr().err == "chief    |  4%\n"


def test_a_line_without_an_end_is_not_held_back_for_ever(
    capfd: pytest.CaptureFixture[str],
) -> None:
    channel = make(None, *TWO).channel("chief")
    channel.feed("stdout", b"x" * LONGEST_LINE)
    assert capfd.readouterr().out == f"chief    | {'x' * LONGEST_LINE}\n"


def test_a_job_in_the_background_keeps_and_does_not_show(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, *TWO, show=False).channel("chief").feed("stdout", b"one\n")
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "chief.log").read_text() == "one\n"


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from tml.docker import prefix

    monkeypatch.setattr(prefix.os, "isatty", lambda _: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert b"\x1b[" in prefix.Printer(["chief", "worker-1"])._prefixes["chief"]
    monkeypatch.setenv("NO_COLOR", "1")
    assert prefix.Printer(["chief", "worker-1"])._prefixes["chief"] == b"chief    | "


def test_the_engines_times_are_compared_by_value(tmp_path: Path) -> None:
    def ended(at: str) -> tuple[str, str]:
        member = _Member(plan(), None, make(None, *TWO).channel("chief"))  # type: ignore[arg-type]
        member.state = {"FinishedAt": at}
        return member.finished_at()

    # The engine leaves out zeros at the end: as text the first of these would be the last.
    times = ["2026-01-01T10:00:00.12Z", "2026-01-01T10:00:00.123Z", "2026-01-01T10:00:01Z"]
    assert [ended(t) for t in times] == sorted(ended(t) for t in times)
    assert sorted(times) != times


def test_a_member_that_had_ended_before_the_engine_went_away_is_not_waited_for() -> None:
    """Its output was cut off with the engine: nobody will tell of the end of that."""
    job = SimpleNamespace(
        gang=SimpleNamespace(members=(plan(),)),
        client=SimpleNamespace(ping=lambda: True),
        events=queue.SimpleQueue(),
        stop_signal=0,
    )
    attempt = _Attempt(job)  # type: ignore[arg-type]
    member = _Member(plan(), None, make(None, plan()).channel("chief"))  # type: ignore[arg-type]
    member.state = {"ExitCode": 0}
    attempt.members = [member]
    attempt.stopping = True
    attempt._engine_lost()
    assert attempt._over()


def test_logs_that_could_not_be_kept_are_not_pointed_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make(tmp_path, *TWO).kept_in == str(tmp_path)
    assert make(None, *TWO).kept_in is None
    (tmp_path / "file").touch()
    assert make(tmp_path / "file", *TWO).kept_in is None
    assert "cannot keep the output" in capsys.readouterr().err


def test_what_comes_after_the_logs_were_closed_is_lost_and_nothing_else(tmp_path: Path) -> None:
    output = make(tmp_path, *TWO, show=False)
    channel = output.channel("chief")
    channel.feed("stdout", b"one\n")
    output.close()
    channel.feed("stdout", b"two\n")
    assert (tmp_path / "chief.log").read_text() == "one\n"
