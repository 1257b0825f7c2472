"""Completion in bash, zsh and fish: of verbs, flags, projects, jobs, roles, files.

`completion SHELL` prints code for the shell. It defines a function `tml`, which is this checkout's
launcher wherever it is called, and completes both it and `python -m tml.docker`. When a shell asks
for words it runs the launcher with _ARGCOMPLETE set; `__main__` then calls `complete` instead of a
verb. argcomplete is imported only here.
"""

import argparse
import os
import shlex
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tml.docker import flags as verbs
from tml.docker.checkout import find_projects
from tml.docker.errors import LauncherError
from tml.docker.plan import LABEL_INDEX, LABEL_JOB, LABEL_ROLE
from tml.machines import environment

ENGINE_TIMEOUT_S = 1.0
"""Nobody waits longer for a word."""
SIZES = ("512m", "1g", "2g", "4g", "8g", "16g")

Completer = Callable[..., Iterable[str]]


def main(flags: argparse.Namespace, args: Sequence[str]) -> int:
    """Print the code for a shell."""
    print(shell_code(flags.shell, sys.executable, environment.tml_base()), end="")
    return 0


def shell_code(shell: str, python: str, checkout: Path) -> str:
    """What the shell is to read: the function `tml`, its completion and that of `python -m`."""
    try:
        from argcomplete.shell_integration import shellcode
    except ImportError as error:
        raise LauncherError(
            f"the Python package argcomplete is not installed in {sys.prefix}: "
            "./scripts/setup_venv.sh launcher"
        ) from error
    values = {"python": shlex.quote(python), "checkout": shlex.quote(str(checkout))}
    before, after = {"bash": (POSIX, BASH), "zsh": (ZSH_FIRST + POSIX, ZSH), "fish": (FISH, "")}[
        shell
    ]
    code = "" if shell == "fish" else shellcode(["tml"], shell=shell)
    return f"# Completion of tml in {shell}.\n{before.format(**values)}\n{code}\n{after}"


# -P: what is in the folder that one happens to be in must not be taken for tml.
POSIX = """\
tml() {{
    PYTHONPATH={checkout}${{PYTHONPATH:+:$PYTHONPATH}} {python} -P -m tml.docker "$@"
}}
"""
BASH = """\
# python -m tml.docker; what completed python before still does where it is not that.
_tml_python() {
    if [[ ${COMP_WORDS[1]-} != -m || ${COMP_WORDS[2]-} != tml.docker || $COMP_CWORD -lt 3 ]]; then
        [[ -z ${_tml_python_before-} ]] || "$_tml_python_before" "$@"
        return
    fi
    local IFS=$'\\013'
    COMPREPLY=($(IFS="$IFS" COMP_LINE="$COMP_LINE" COMP_POINT="$COMP_POINT" \\
        COMP_TYPE="$COMP_TYPE" _ARGCOMPLETE_COMP_WORDBREAKS="$COMP_WORDBREAKS" _ARGCOMPLETE=3 \\
        _ARGCOMPLETE_SHELL=bash _ARGCOMPLETE_SUPPRESS_SPACE=1 __python_argcomplete_run tml))
    [[ ${COMPREPLY-} =~ [=/:]$ ]] || compopt +o nospace
}
if [[ -z ${_tml_python_before+set} ]]; then
    { declare -F _comp_load && _comp_load python; } >/dev/null 2>&1 ||
        { declare -F _completion_loader && _completion_loader python; } >/dev/null 2>&1
    _tml_python_before=$(complete -p python 2>/dev/null | sed -n 's/.* -F \\([^ ]*\\) .*/\\1/p')
fi
complete -o nospace -o default -o bashdefault -F _tml_python python python3
"""
ZSH_FIRST = """\
(( $+functions[compdef] )) || {{ autoload -Uz compinit; compinit -u }}
"""
ZSH = """\
# python -m tml.docker; what completed python before still does where it is not that.
_tml_python() {
    if [[ ${words[2]-} != -m || ${words[3]-} != tml.docker || $CURRENT -lt 4 ]]; then
        ${_tml_python_before:-_default} "$@"
        return
    fi
    local IFS=$'\\013' completions
    completions=($(IFS="$IFS" COMP_LINE="$BUFFER" COMP_POINT="$CURSOR" _ARGCOMPLETE=3 \\
        _ARGCOMPLETE_SHELL=zsh _ARGCOMPLETE_SUPPRESS_SPACE=1 __python_argcomplete_run tml))
    _describe tml completions
}
[[ -n ${_tml_python_before+set} ]] || _tml_python_before=${_comps[python]-}
compdef _tml_python python python3
"""
FISH = """\
function tml
    set -lx --prepend --path PYTHONPATH {checkout}
    {python} -P -m tml.docker $argv
end
function __fish_tml_complete
    # 1: the words are those of tml; 3: of python -m tml.docker.
    set -lx _ARGCOMPLETE $argv[1]
    set -lx _ARGCOMPLETE_DFS \\t
    set -lx _ARGCOMPLETE_IFS \\n
    set -lx _ARGCOMPLETE_SUPPRESS_SPACE 1
    set -lx _ARGCOMPLETE_SHELL fish
    set -lx COMP_LINE (commandline -p)
    set -lx COMP_POINT (string length (commandline -cp))
    set -lx COMP_TYPE
    tml 8>&1 9>&2 1>/dev/null 2>&1
end
complete -c tml -f -a '(__fish_tml_complete 1)'
function __fish_is_tml
    string match -q -- "-m tml.docker" (string join " " -- (commandline -poc)[2..3])
end
for name in python python3
    complete -c $name -n __fish_is_tml -f -a '(__fish_tml_complete 3)'
end
"""


def complete() -> None:
    """Answer the shell's question for words, and end the process. Silent whatever goes wrong."""
    from argcomplete.completers import ChoicesCompleter, DirectoriesCompleter, FilesCompleter
    from argcomplete.finders import CompletionFinder

    parser = verbs.build_parser()
    files = FilesCompleter()
    completers: dict[str, Completer] = {
        "project": lambda **_: (project.name for project in find_projects(environment.tml_base())),
        "job": _jobs,
        "role": _roles,
        "gpus": lambda **_: _gpus(),
        "env": lambda **_: os.environ,
        "network": lambda **_: ("host", "bridge", "none"),
        "nproc_per_node": lambda **_: ("auto", "gpu", "cpu", "1", "2", "4", "8"),
        "shm_size": lambda **_: SIZES,
        "memory": lambda **_: SIZES,
        "data": DirectoriesCompleter(),
        "mount": files,
        "output": files,
    }
    for action in _actions(parser):
        if action.dest in completers:
            action.completer = completers[action.dest]  # type: ignore[attr-defined]

    class Finder(CompletionFinder):
        """Offers nothing of ours after --: what stands there is the program's."""

        def _get_completions(self, comp_words: list[str], *rest: Any) -> list[str]:
            if "--" in comp_words:
                return []
            return list(super()._get_completions(comp_words, *rest))  # type: ignore[no-untyped-call]

    finder = Finder()
    finder(parser, always_complete_options=False, default_completer=ChoicesCompleter({}))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All flags and arguments of all verbs."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from _actions(verb)


def _jobs(parsed_args: argparse.Namespace, **_: Any) -> Iterable[str]:
    """Jobs that run; of logs and wait also those that have ended."""
    from tml.docker import records

    names = {labels[LABEL_JOB] for labels in _running() if LABEL_JOB in labels}
    if getattr(parsed_args, "verb", None) in ("logs", "wait"):
        names |= {record.job for record in records.read_all()}
    return sorted(names)


def _roles(parsed_args: argparse.Namespace, **_: Any) -> Iterable[str]:
    """Members of the job that was typed, or of those that run."""
    from tml.docker import records

    job = getattr(parsed_args, "job", None)
    members = set()
    for labels in _running():
        if job in (None, labels.get(LABEL_JOB)):
            role, index = labels.get(LABEL_ROLE, "chief"), labels.get(LABEL_INDEX, "0")
            members.add(role if index == "0" else f"{role}-{index}")
    record = records.read(job) if job else None
    members |= set(record.members) if record else set()
    return sorted(members) or ("chief", "worker-1")


def _gpus() -> Iterable[str]:
    there = Path("/proc/driver/nvidia/gpus")
    count = len(list(there.iterdir())) if there.is_dir() else 1
    return ["all", *map(str, range(1, count + 1)), *(f"device={n}" for n in range(count))]


def _running() -> list[Mapping[str, str]]:
    """Labels of the containers of jobs that run; none where the engine does not answer at once."""
    found: list[Mapping[str, str]] = []

    def ask() -> None:
        from tml.docker.connection import connect

        try:
            client, _ = connect()
            found.extend(c["Labels"] for c in client.containers(filters={"label": LABEL_JOB}))
        except Exception:
            return  # A shell's line is no place for a traceback.

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ENGINE_TIMEOUT_S)
    return list(found)
