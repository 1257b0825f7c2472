"""What is known of a container that ended in a job that failed: its state, and what its last lines
say. Pure.

torchrun puts a traceback and a report of its own behind what its processes said; here the two are
told apart.
"""

import re
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from tml.docker.plan import Plan

LINES_WANTED = 400
"""Last lines worth gathering of each container: torchrun's own report alone takes 40 a process."""
ORPHANED = 3
"""Exit code of a training process that stopped because another is gone (tml.program.ORPHANED)."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """One container of a job that failed."""

    plan: Plan
    exit_code: int | None
    """None: it never started, or it is gone."""
    stopped_by_us: bool
    """It ended after our SIGTERM or SIGKILL."""
    oom_killed: bool
    memory_peak: int | None
    """Bytes seen in use; None where unknown."""
    last_lines: tuple[str, ...]
    """The last of its output, LINES_WANTED of them where there are as many."""
    error: str
    """The engine's own State.Error."""
    cut_off: bool
    """It was disconnected from the job's network."""
    first: bool
    """It failed first."""


_ANSI = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07)")
_TORCHRUN_NOISE = re.compile(r"[WI]\d{4} .*torch/distributed/(run|elastic/[\w/]+)\.py:\d+\]")
_TORCHRUN_FAILED = re.compile(r"E\d{4} .*elastic/multiprocessing/api\.py.* failed \(exitcode: ")
_ROOT_RANK = re.compile(r"\s*rank\s*: (\d+) ")
_ROOT_CODE = re.compile(r"\s*exitcode\s*: (-?\d+) ")
_RANK = re.compile(r"^\[rank(\d+)\]:\s?")
_EXCEPTION = re.compile(r"^(?:[A-Za-z_]\w*\.)*([A-Z]\w*(?:Error|Exception|Interrupt|Expired))\b:?")
_OWN_ERROR = re.compile(r"^(?:[\w-]+\.py: )?error: (.+)")
"""As tml.program.fail says it; argparse puts the program's name before."""
_PEER = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|remote worker crash"
    r"|NCCL.*remote (process|error)|recvValue failed|Timed out waiting .* for (recv|send)"
    r"|DistStoreError|gloo.*timed? ?out",
    re.IGNORECASE,
)


def clean_lines(ended: Ended) -> list[str]:
    """Its last lines as a terminal would show them, without colours, and without the values of its
    secrets: what is said here goes into the job's record.
    """
    secrets = [v.value for v in ended.plan.env if v.secret and len(v.value) >= 4]
    cleaned = []
    for line in ended.last_lines:
        text = _ANSI.sub("", line).rstrip().rpartition("\r")[2]
        for secret in secrets:
            text = text.replace(secret, "***")
        if text:
            cleaned.append(text)
    return cleaned


def program_lines(lines: list[str]) -> list[str]:
    """Without torchrun's own traceback and report, which push what its processes said out of
    sight; all where nothing else is there.
    """
    kept: list[str] = []
    rules_left = 0
    for line in lines:
        if _TORCHRUN_FAILED.match(line):
            # Its report stands between two lines of =, after its own traceback.
            rules_left = 2
        elif rules_left:
            rules_left -= bool(re.fullmatch("={10,}", line))
        elif not _TORCHRUN_NOISE.match(line):
            kept.append(line)
    return kept or lines


def _root(lines: Sequence[str]) -> list[str]:
    """torchrun's report of the process that failed first."""
    starts = [number for number, line in enumerate(lines) if line.startswith("Root Cause (first")]
    return list(lines[starts[-1] + 1 :]) if starts else []


def root_rank(lines: Sequence[str]) -> int | None:
    match = next(filter(None, map(_ROOT_RANK.match, _root(lines))), None)
    return int(match.group(1)) if match else None


def root_signal(lines: Sequence[str]) -> str | None:
    """The signal that ended the first process of torchrun to fail."""
    match = next(filter(None, map(_ROOT_CODE.match, _root(lines))), None)
    return signal_name(128 - int(match.group(1))) if match and int(match.group(1)) < 0 else None


def last_exception(lines: Sequence[str], rank: int | None = None) -> str | None:
    """The line of the last exception that is not only about a lost peer, of `rank` if possible."""
    found: list[tuple[int | None, str]] = []
    for line in lines:
        prefix = _RANK.match(line)
        text = line[prefix.end() :] if prefix else line
        if _EXCEPTION.match(text) and not _PEER.search(text) and "ChildFailedError" not in text:
            found.append((int(prefix.group(1)) if prefix else None, text))
    of_rank = [text for by, text in found if by == rank]
    texts = of_rank or [text for _, text in found]
    return texts[-1] if texts else None


def lost_a_peer(ended: Ended) -> bool:
    """It failed only because another process vanished."""
    if ended.exit_code == ORPHANED:
        return True
    lines = program_lines(clean_lines(ended))
    return (
        ended.exit_code == 1
        and any(_PEER.search(line) for line in lines)
        and last_exception(lines) is None
        and own_error(lines) is None
        and root_signal(ended.last_lines) is None
    )


def own_error(lines: Sequence[str]) -> str | None:
    """The message of a program of ours that refused to go on, in one line."""
    return next((message for message, _ in _own_errors(lines)), None)


def ends_with_own_error(lines: Sequence[str]) -> bool:
    """Whether nothing was said after such a message."""
    return any(end == len(lines) for _, end in _own_errors(lines))


def _own_errors(lines: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Each message, and the number of the line after it. A message goes on in indented lines."""
    texts = [_RANK.sub("", line) for line in lines]
    for number, text in enumerate(texts):
        if match := _OWN_ERROR.match(text):
            more = list(takewhile(lambda line: line[:1].isspace(), texts[number + 1 :]))
            told = " ".join([match.group(1).strip(), *(line.strip() for line in more)])
            yield told, number + 1 + len(more)


def signal_name(exit_code: int) -> str | None:
    """SIGKILL for 137: the signal that an exit code of 128 + n stands for."""
    try:
        return signal.Signals(exit_code - 128).name if exit_code > 128 else None
    except ValueError:
        return None


def engine_error(ended: Ended) -> str:
    """What the engine says, without the list of programs that it was passed through."""
    return ended.error.rpartition("unable to start container process: ")[2].strip()


def shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
