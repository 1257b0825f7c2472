"""The verbs and their flags. Each names the function that carries it out, which is imported only
then.
"""

import argparse
import re
import sys
from difflib import get_close_matches
from typing import NoReturn, TypeAlias

from tml.docker.plan import STOP_GRACE_S

PROLOGUE = """Train in containers: one image, one command.

start
  run          build the image if needed and train a project in a container
  up           train it in several containers, as one job
  shell        a shell in the image            test    the tests, in the image
watch
  ps           the jobs                        logs    what they say
  wait         for a job to end                exec    a command inside one
end
  stop         a job, with grace               gc      what dead launchers left
set up
  doctor       what is wrong with this machine, and what to do about it
  build        the image                       ping    is there an engine?
  compose-env  .env for docker compose         completion  in your shell
"""
EPILOGUE = """examples:
  python -m tml.docker run                      train twhin, on its own graph
  python -m tml.docker up --workers 2 --detach  three containers, unattended
  python -m tml.docker logs -f                  watch the only job there is
  python -m tml.docker doctor                   when something is wrong

`VERB --help` has a verb's flags, with examples; docs/runtime.md tells how a job
lives. Exit status of run, up and exec: that of what they ran; else 125 where
the launcher or the engine failed, 130 after Ctrl-C, 2 for mistaken flags.
"""

RUN_EXAMPLES = """examples:
  python -m tml.docker run                        train twhin, on its own graph
  python -m tml.docker run recap                  the other project
  python -m tml.docker run --nproc-per-node 2     with two processes
  python -m tml.docker run --gpus all             on every GPU of this machine
  python -m tml.docker run --detach               unattended: logs, wait, stop
  python -m tml.docker run --env HF_TOKEN         a secret, by its name
  python -m tml.docker run --dry-run              print the docker run line
  python -m tml.docker run --data /srv/graph -- --config_yaml_path=/data/my.yaml

What stands after -- goes to the project's program. Runs are kept below
~/tmp/runs, which is /root/tmp/runs in the container. Ctrl-C ends a run with a
checkpoint; the same command goes on from there.
"""
UP_EXAMPLES = """examples:
  python -m tml.docker up                         twhin: a chief and a worker
  python -m tml.docker up --workers 3 --cpus 0.5  four, of half a processor each
  python -m tml.docker up --max-restarts 2        a failure starts all again,
                                                  twice, where they had come to
  python -m tml.docker up --detach                unattended: logs, wait, stop
  python -m tml.docker up --dry-run               print the docker lines
  python -m tml.docker up recap --evaluator -- --config_path=/root/tmp/my.yaml

The first container that fails stops all of them, and its exit status is that of
the job, which has succeeded when all have. What each says is also kept in the
run folder, logs/JOB/. What stands after -- goes to the project's program.
"""
SHELL_EXAMPLES = """examples:
  python -m tml.docker shell                      look around, as a run would
  python -m tml.docker shell --dev                with the tests' tools
  python -m tml.docker shell -- -c 'nproc; df -h /dev/shm'
"""
TEST_EXAMPLES = """examples:
  python -m tml.docker test                       all that need no engine
  python -m tml.docker test -- tests/unit -k losses
"""
BUILD_EXAMPLES = """examples:
  python -m tml.docker build                      local/torch, if it is stale
  python -m tml.docker build --dev                and with the tests' tools
  python -m tml.docker build --gpu                local/torch:gpu, for --gpus

run, up, shell and test build what they need. An image whose Dockerfile and
requirements/ have not changed is not built again, and no network is asked.
"""
PING_EXAMPLES = """Exit status 0, version and address where one answers; else 125 and why not.
"""
PS_EXAMPLES = """examples:
  python -m tml.docker ps                         what runs
  python -m tml.docker ps -a                      also how others have ended
  python -m tml.docker ps --json                  for programs
"""
LOGS_EXAMPLES = """examples:
  python -m tml.docker logs                       of the only job, or the newest
  python -m tml.docker logs -f tml-twhin-1a2b     and go on until it ends
  python -m tml.docker logs --role worker-1 --tail 50
"""
STOP_EXAMPLES = """examples:
  python -m tml.docker stop                       the only job that runs
  python -m tml.docker stop tml-twhin-1a2b        that one
  python -m tml.docker stop --all --stop-grace 5  all, with little patience

Training ends with a checkpoint; the command that started it goes on from there.
"""
WAIT_EXAMPLES = """examples:
  python -m tml.docker wait && echo trained
  python -m tml.docker wait tml-twhin-1a2b --timeout 3600
"""
EXEC_EXAMPLES = """examples:
  python -m tml.docker exec                       a shell in the only job
  python -m tml.docker exec -- nvidia-smi
  python -m tml.docker exec tml-twhin-1a2b --role worker-1 -- bash
"""
GC_EXAMPLES = """examples:
  python -m tml.docker gc --dry-run               what would go
  python -m tml.docker gc

Removes containers and networks of jobs whose launcher is dead (killed with -9,
or the machine was restarted), and nothing else: what a living launcher or
another machine owns, and what this launcher did not start, stays.
"""
COMPOSE_ENV_EXAMPLES = """examples:
  python -m tml.docker compose-env --workers 2 && docker compose up
  python -m tml.docker compose-env --project recap --profile evaluator
  python -m tml.docker compose-env -- --set training.num_epochs=1

What stands after -- goes to the project's program. The lines between our marks
are written anew; what else .env holds stays.
"""
COMPLETION_EXAMPLES = """examples:
  source <(.venv/bin/python -m tml.docker completion bash)
  .venv/bin/python -m tml.docker completion bash >> ~/.bashrc     for always
  .venv/bin/python -m tml.docker completion zsh >> ~/.zshrc
  .venv/bin/python -m tml.docker completion fish | source

It completes `python -m tml.docker`, and `tml`, a function that is short for it:
tml run recap.
"""
DOCTOR_EXAMPLES = """examples:
  python -m tml.docker doctor
  python -m tml.docker doctor --json | jq '.checks[] | select(.level != "ok")'

Each line is ok (✓), a warning (!) or an error (✗), the latter two with what to
do. Exit status 1 where there is an error. Nothing is changed.
"""

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


PROG = "python -m tml.docker"


class _Help(argparse.RawDescriptionHelpFormatter):
    """Room for the longest flag before its help; verbs are listed in PROLOGUE, by what they are
    for, and not a second time.
    """

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26)

    def _format_action(self, action: argparse.Action) -> str:
        listed = isinstance(action, argparse._SubParsersAction)
        return "" if listed else super()._format_action(action)


class _Parser(argparse.ArgumentParser):
    """A mistake is told in a line, with what was likely meant; exit status 2."""

    def error(self, message: str) -> NoReturn:
        """End with `message`."""
        wrong = re.match(r"argument VERB: invalid choice: '([^']*)'", message)
        if wrong:
            verbs = list(_parsers(self))
            message = f"there is no verb {wrong[1]!r}; "
            near = get_close_matches(wrong[1], verbs, n=1)
            message += f"did you mean {near[0]}?" if near else f"there are: {', '.join(verbs)}"
        self.exit(2, f"tml: {message}\n  {self.prog} --help shows what there is\n")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and what stands after `--`."""
    args: list[str] = []
    if "--" in argv:
        cut = argv.index("--")
        argv, args = argv[:cut], argv[cut + 1 :]
    parser = build_parser()
    if not argv:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    flags, unknown = parser.parse_known_args(argv)
    verb = _parsers(parser)[flags.verb]
    if unknown:
        verb.error(_unknown(verb, unknown, flags.takes_args, _parsers(parser)["up"]))
    if args and not flags.takes_args:
        verb.error(f"{flags.verb} takes nothing after --")
    return flags, args


def _unknown(
    verb: argparse.ArgumentParser,
    unknown: list[str],
    takes_args: bool,
    up: argparse.ArgumentParser,
) -> str:
    """What to say of words that a verb does not know."""
    name, flag = verb.prog.rpartition(" ")[2], unknown[0].partition("=")[0]
    message = f"{name} does not know {' '.join(unknown)}"
    there = _flags_of(verb)
    # What only `up` has is looked for in `run`, which trains on one container.
    of_up = [other for other in _flags_of(up) if other not in there] if name == "run" else []
    # The launcher's own have no _; somebody may have typed one for a -.
    near = get_close_matches(flag.replace("_", "-"), there + of_up, n=1)
    if takes_args and _is_programs(flag, near):
        return f"{message}: flags of the program go after --, as in\n    {verb.prog} -- {flag} …"
    if near:
        message += f"; up has {near[0]}" if near[0] in of_up else f"; did you mean {near[0]}?"
    return message + ("\n  what is meant for the program stands after --" if takes_args else "")


def _flags_of(verb: argparse.ArgumentParser) -> list[str]:
    return [name for action in verb._actions for name in action.option_strings]


def _is_programs(flag: str, near: list[str]) -> bool:
    """Whether a flag looks like one of the projects' programs: --set, --save_dir, --config_path;
    `near`: the launcher's own that it may be meant for.
    """
    if near and near[0] == flag.replace("_", "-"):
        return False
    return flag == "--set" or "_" in flag or flag in ("--config", "--config-path", "--save-dir")


def _parsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each verb."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser: argparse.ArgumentParser = _Parser(
        prog=PROG,
        description=PROLOGUE,
        epilog=EPILOGUE,
        allow_abbrev=False,
        formatter_class=_Help,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", title="verbs")
    _add_run(verbs)
    _add_up(verbs)
    shell = _verb(
        verbs,
        "shell",
        "launch:shell",
        "a shell in the image, with the mounts of a run",
        SHELL_EXAMPLES,
    )
    _container_flags(shell)
    _single_flags(shell)
    shell.add_argument(
        "--dev", action="store_true", help="in local/torch:dev, with the tests' tools"
    )
    test = _verb(
        verbs, "test", "launch:test", "the tests that need no engine, in the image", TEST_EXAMPLES
    )
    _container_flags(test)
    _single_flags(test)
    _add_build(verbs)
    ping = "say whether an engine answers"
    _verb(verbs, "ping", "launch:ping", ping, PING_EXAMPLES, takes_args=False)
    _add_jobs(verbs)
    _add_setup(verbs)
    return parser


def _add_run(verbs: Verbs) -> None:
    run = _verb(
        verbs, "run", "launch:run", "build the image if needed and train a project", RUN_EXAMPLES
    )
    _project(run)
    _container_flags(run)
    _single_flags(run)
    _detach(run)
    _nproc(run)


def _add_up(verbs: Verbs) -> None:
    up = _verb(
        verbs, "up", "launch:up", "train a project in several containers, as one job", UP_EXAMPLES
    )
    _project(up)
    add = up.add_argument
    add(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="containers beside the chief's (default 1)",
    )
    add(
        "--datasetworkers",
        type=int,
        default=0,
        metavar="N",
        help="containers that read the data for the others (default 0)",
    )
    add(
        "--evaluator",
        action="store_true",
        help="one more container, which follows the checkpoints and measures them",
    )
    add(
        "--max-restarts",
        type=int,
        default=0,
        metavar="K",
        help="after a failure start all again, from the last complete checkpoint, K times at most",
    )
    add("--timestamps", action="store_true", help="the time before each line")
    _container_flags(up)
    _detach(up)
    _nproc(up)


def _add_build(verbs: Verbs) -> None:
    build = _verb(
        verbs, "build", "launch:build", "build the image", BUILD_EXAMPLES, takes_args=False
    )
    which = build.add_mutually_exclusive_group()
    which.add_argument("--gpu", action="store_true", help="the CUDA variant, local/torch:gpu")
    which.add_argument(
        "--dev", action="store_true", help="also the stage with the tests' tools, local/torch:dev"
    )
    build.add_argument("--force", action="store_true", help="build although nothing changed")
    build.add_argument(
        "--stage",
        action="store_true",
        help="only write .build/, from which `docker compose build` takes wheels",
    )


def _add_jobs(verbs: Verbs) -> None:
    ps = _verb(
        verbs, "ps", "jobs:ps", "the jobs: those that run, and how others ended", PS_EXAMPLES
    )
    ps.add_argument("--all", "-a", action="store_true", help="also those that have ended")
    _json(ps)

    logs = _verb(verbs, "logs", "logs:logs", "what the containers of a job say", LOGS_EXAMPLES)
    _job(logs)
    add = logs.add_argument
    add("--follow", "-f", action="store_true", help="go on until the job ends")
    add("--tail", type=int, metavar="N", help="the last N lines of each container alone")
    add("--timestamps", action="store_true", help="the time before each line")
    _role(logs, None)
    _json(logs)

    stop = _verb(
        verbs, "stop", "stop:stop", "stop a job: SIGTERM, the grace, SIGKILL", STOP_EXAMPLES
    )
    _job(stop)
    stop.add_argument("--all", "-a", action="store_true", help="every job of yours that runs")
    stop.add_argument(
        "--stop-grace",
        type=int,
        metavar="S",
        help="seconds from SIGTERM to SIGKILL (default: those the job was started with)",
    )
    _json(stop)

    wait = _verb(
        verbs,
        "wait",
        "jobs:wait",
        "wait until a job has ended; its exit status is that of wait",
        WAIT_EXAMPLES,
    )
    _job(wait)
    wait.add_argument("--timeout", type=float, metavar="S", help="124 after so many seconds")
    _json(wait)

    execute = _verb(
        verbs,
        "exec",
        "exec:execute",
        "a command inside a container of a job; without one, a shell",
        EXEC_EXAMPLES,
    )
    _job(execute)
    _role(execute, "chief")
    execute.add_argument("--user", metavar="UID[:GID]", help="default: the container's")
    _json(execute)

    gc = _verb(
        verbs, "gc", "stop:gc", "remove what launchers that are dead left behind", GC_EXAMPLES
    )
    gc.add_argument("--dry-run", action="store_true", help="say what would be removed")
    _json(gc)


def _add_setup(verbs: Verbs) -> None:
    doctor = _verb(
        verbs, "doctor", "doctor:main", "look at engine, image, machine, jobs", DOCTOR_EXAMPLES
    )
    _json(doctor)

    compose = _verb(
        verbs,
        "compose-env",
        "compose:write_env",
        "write .env, which docker-compose.yml is filled from",
        COMPOSE_ENV_EXAMPLES,
        takes_args=True,
    )
    add = compose.add_argument
    add(
        "--project",
        default="twhin",
        metavar="PROJECT",
        help="twhin (default), recap, or a folder below projects/",
    )
    add("--workers", type=int, default=1, metavar="N", help="containers beside the chief's")
    add("--shm-size", metavar="SIZE", help="size of /dev/shm, such as 512m (default 2g)")
    add("--memory", metavar="SIZE", help="memory limit of each container (default none)")
    add("--cpus", type=float, metavar="N", help="processor limit of each container (default none)")
    add("--data", metavar="DIR", help="a folder to be seen, read-only, at /data")
    _nproc(compose)
    add(
        "--profile",
        action="append",
        default=[],
        choices=("datasetworker", "evaluator", "tensorboard"),
        metavar="SERVICE",
        help="start datasetworker, evaluator or tensorboard too; repeatable",
    )
    add("--output", metavar="FILE", help="default: .env in the checkout; - prints it")

    completion = _verb(
        verbs,
        "completion",
        "completion:main",
        "print what your shell needs to complete verbs, flags and names",
        COMPLETION_EXAMPLES,
        takes_args=False,
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))


# Flags that several verbs have


def _verb(
    verbs: Verbs,
    name: str,
    function: str,
    what: str,
    more: str = "",
    *,
    takes_args: bool | None = None,
) -> argparse.ArgumentParser:
    """A verb that `tml.docker.<function>` carries out."""
    parser = verbs.add_parser(
        name,
        help=what,
        description=what,
        epilog=more,
        allow_abbrev=False,
        formatter_class=_Help,
    )
    module = function.partition(":")[0]
    if takes_args is None:
        takes_args = module == "launch" or name == "exec"
    parser.set_defaults(function=f"tml.docker.{function}", takes_args=takes_args)
    return parser


def _project(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "project",
        nargs="?",
        default="twhin",
        metavar="PROJECT",
        help="twhin (default), recap, or a folder below projects/",
    )


def _job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "job",
        nargs="?",
        metavar="JOB",
        help="name as `ps` shows it, or its beginning; default: the only one that runs",
    )


def _role(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument(
        "--role",
        default=default,
        metavar="ROLE",
        help=f"chief, worker-1, … (default: {default or 'all'})",
    )


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="JSON, for programs")


def _detach(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--detach",
        action="store_true",
        help="print the job's name and leave it running; see logs, wait, stop, ps",
    )


def _nproc(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nproc-per-node",
        metavar="N",
        help="processes that torchrun starts in each container: a count, auto, gpu or cpu",
    )


def _single_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of one container; several have a network of their own."""
    parser.add_argument(
        "--network",
        default="host",
        metavar="NAME",
        help="host (default), bridge, none or a network's name",
    )


def _container_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--gpus",
        metavar="WHICH",
        help="all, a count, ids such as 0,1, or device=0; takes local/torch:gpu",
    )
    add("--shm-size", metavar="SIZE", help="size of /dev/shm, such as 512m (default 2g)")
    add("--memory", metavar="SIZE", help="memory limit, such as 4g (default none)")
    add("--cpus", type=float, metavar="N", help="processor limit, such as 1.5 (default none)")
    add(
        "--user",
        metavar="UID[:GID]",
        help="user in the container (default: whoever makes the files yours)",
    )
    add(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="a variable; NAME alone takes the value from here, and shows it nowhere",
    )
    add(
        "--mount",
        action="append",
        default=[],
        metavar="SRC:DST[:ro]",
        help="a further folder, SRC here, DST there",
    )
    add("--data", metavar="DIR", help="a folder to be seen, read-only, at /data")
    add(
        "--config-mount",
        choices=("ro", "rw", "none"),
        default="ro",
        help="~/.config in the container (default ro)",
    )
    add(
        "--publish",
        action="append",
        default=[],
        metavar="[PORT:]PORT",
        help="a port of the (chief's) container at 127.0.0.1; run needs --network bridge for it",
    )
    add(
        "--read-only",
        action="store_true",
        help="nothing in the container can be written to but the mounts, /tmp and home (in memory)",
    )
    add("--name", help="the job's name (default: tml-PROJECT-… of random digits)")
    add(
        "--stop-grace",
        type=int,
        default=STOP_GRACE_S,
        metavar="S",
        help=f"seconds from SIGTERM to SIGKILL ({STOP_GRACE_S})",
    )
    policy = parser.add_mutually_exclusive_group()
    policy.add_argument(
        "--build",
        dest="build",
        action="store_const",
        const="always",
        default="when-needed",
        help="build although nothing changed",
    )
    policy.add_argument(
        "--no-build",
        dest="build",
        action="store_const",
        const="never",
        help="take the image as it is, stale or not",
    )
    add(
        "--dry-run",
        action="store_true",
        help="print the docker lines that this is, and do nothing",
    )
    add("--json", action="store_true", help="print the plan, and do nothing")
