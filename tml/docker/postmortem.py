"""Why a job failed: from how its containers ended and what they said last to a cause, a text for
people and a remedy. Pure; gang.py and engine.py gather what is known, and print.

Containers of a gang fall like dominoes, so the first to fail need not be the cause: a process that
only lost its peer (exit code 3, "Connection closed by peer") points at another container, and a
container that was cut off from the network made the others lose it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from textwrap import wrap

from tml.docker.evidence import (
    Ended,
    clean_lines,
    ends_with_own_error,
    engine_error,
    last_exception,
    lost_a_peer,
    own_error,
    program_lines,
    root_rank,
    shorten,
    signal_name,
)
from tml.docker.hints import find_reason

LINES_SHOWN = 20
LONGEST_CAUSE = 300
WIDTH = 96


@dataclass(frozen=True, kw_only=True)
class PostMortem:
    """`cause` in one line. `text` is what is said below the container's output: the cause and the
    rest; of a program that refused to go on only how it ended, since the output ends with the why.
    """

    cause: str
    text: str


def explain_failure(ended: Sequence[Ended], logs: str | None) -> PostMortem:
    """What is to be said of a job that failed; logs: the folder that has <member>.log."""
    culprit = find_culprit(ended)
    told = program_lines(clean_lines(culprit))
    finding = find_reason(culprit, told)
    how = _how_it_ended(culprit)
    what = finding.what if finding else last_exception(told, root_rank(culprit.last_lines))
    joint = ", " if signal_name(culprit.exit_code or 0) and finding else ": "
    cause = f"{_name(culprit, ended)} {how}" + (f"{joint}{what}" if what else "")
    cause = shorten(cause, LONGEST_CAUSE)
    # Then the cause is all that there is to say, and it was the last thing that was seen.
    refused = bool(finding) and what == own_error(told) and ends_with_own_error(told)
    if refused:
        where = f"\n  its output: {logs}/{culprit.plan.member}.log" if logs and ended[1:] else ""
        return PostMortem(cause=cause, text=f"{_name(culprit, ended)} {how}{where}")
    lines = [cause, *_table(ended, culprit)]
    if told:
        lines += [f"  last lines of {_name(culprit, ended)}:"]
        lines += [f"    {shorten(line, 400)}" for line in told[-LINES_SHOWN:]]
    if finding and finding.remedy:
        lines += wrap(
            f"what to do: {finding.remedy}",
            WIDTH,
            initial_indent="  ",
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    if logs is not None:
        lines.append(f"  all of its output: {logs}/{culprit.plan.member}.log")
    return PostMortem(cause=cause, text="\n".join(lines))


def find_culprit(ended: Sequence[Ended]) -> Ended:
    """The container that is to blame: the first to fail, unless it failed only because another had
    vanished.
    """
    first = next((e for e in ended if e.first), None)
    first = first or next((e for e in ended if e.exit_code != 0 and not e.stopped_by_us), ended[0])
    if first.oom_killed or not lost_a_peer(first):
        return first
    others = [e for e in ended if e is not first and e.exit_code != 0 and not lost_a_peer(e)]
    blamed = (
        [e for e in ended if e.cut_off]
        + [e for e in others if e.oom_killed]
        + [e for e in others if not e.stopped_by_us]
    )
    return blamed[0] if blamed else first


def _how_it_ended(ended: Ended) -> str:
    code = ended.exit_code
    if ended.cut_off and not ended.oom_killed:
        return f"was cut off from the network {ended.plan.network}"
    if code is None:
        return "could not be started" if ended.error else "is gone: somebody removed it"
    name = signal_name(code)
    by = " by the launcher" if ended.stopped_by_us else ""
    if name == "SIGKILL":
        return f"was killed (SIGKILL){by}"
    if name:
        return f"was ended by {name}" + (", sent by the launcher" if by else "")
    return f"ended with exit code {code}"


def _table(ended: Sequence[Ended], culprit: Ended) -> Iterator[str]:
    """One line for each container."""
    width = max(len(_name(e, ended)) for e in ended)
    for e in [culprit, *(e for e in ended if e is not culprit)]:
        facts = [_code(e)]
        if e.first and len(ended) > 1:
            facts.append("the first to fail")
        if e.oom_killed:
            facts.append("out-of-memory killed")
        elif e.exit_code == 137:
            facts.append("not out of memory")
        if e.cut_off:
            facts.append("cut off from the job's network")
        if e.stopped_by_us:
            facts.append("stopped by the launcher")
        elif lost_a_peer(e) and not e.cut_off:
            facts.append("lost another container")
        if e.error:
            facts.append(f"the engine says: {shorten(engine_error(e), 300)}")
        yield f"  {_name(e, ended):<{width}}  {', '.join(facts)}"


def _code(ended: Ended) -> str:
    if ended.exit_code is None:
        return "no exit code"
    name = signal_name(ended.exit_code)
    return f"exit code {ended.exit_code}" + (f" ({name})" if name else "")


def _name(ended: Ended, all_of_them: Sequence[Ended]) -> str:
    """Within a job of several its role says more than its name."""
    return ended.plan.member if len(all_of_them) > 1 else ended.plan.name
