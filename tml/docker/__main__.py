"""The launcher's verbs.

    python -m tml.docker run [PROJECT] [flags] [-- ARGS]   build the image if needed, and train
    python -m tml.docker build                             build the image
    python -m tml.docker shell                             a shell in the image, mounts as in a run
    python -m tml.docker test                              tests that need no engine, in the image
    python -m tml.docker ping                              is there an engine?

Exit status of run, shell, test: the container's own; 125 where the launcher or the engine failed,
126 or 127 where the command could not start; 130 after Ctrl-C, 143 after SIGTERM; 2 for a mistake
in the flags.
"""

import argparse
import getpass
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from tml.docker import plan as plans
from tml.docker.checkout import find_project
from tml.docker.errors import LauncherError, NoEngineError
from tml.docker.plan import Host, Plan, Request, Variant
from tml.docker.terminal import is_terminal
from tml.docker.users import EngineKind
from tml.machines import environment

if TYPE_CHECKING:
    from docker import APIClient

BuildPolicy = Literal["when-needed", "always", "never"]


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out one verb; returns the exit status."""
    flags, args = parse(list(sys.argv[1:] if argv is None else argv))
    logging.basicConfig(level=logging.INFO, format="tml: %(message)s", stream=sys.stderr)
    logging.getLogger("urllib3").setLevel(logging.WARNING)
    signal.signal(signal.SIGINT, _interrupt)
    for number in (signal.SIGTERM, signal.SIGHUP):
        # As an exception, so that a build that is stopped still tidies up. A run has its own way.
        signal.signal(number, _end)
    try:
        return int(flags.verb_function(flags, args))
    except LauncherError as error:
        print(f"tml: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("tml: interrupted", file=sys.stderr)
        return 130


def _end(number: int, _: object) -> NoReturn:
    _ended_by.append(number)
    raise SystemExit(128 + number)


def _interrupt(number: int, _: object) -> NoReturn:
    _ended_by.append(number)
    raise KeyboardInterrupt


_ended_by: list[int] = []
"""Signals received before a container runs. Python drops an exception that is raised within a
callback of its import machinery, so what was raised may not have arrived: it is looked at again.
"""


def _end_if_told() -> None:
    if signal.SIGINT in _ended_by:
        raise KeyboardInterrupt
    if _ended_by:
        raise SystemExit(128 + _ended_by[0])


def run(flags: argparse.Namespace, args: Sequence[str]) -> int:
    """Train a project in a container."""
    checkout = environment.tml_base()
    project = find_project(checkout, flags.project)
    request = _request(flags, args)
    if flags.dry_run or flags.json:
        return _show(
            plans.plan_run(request, _host_for_show(request), project, _run_id()), flags.json
        )
    client, host = _client_and_host(request)
    plan = plans.plan_run(request, host, project, _run_id())
    _prepare_mounts(plan, host)
    _ensure_image(client, checkout, _variant(plan), flags.build)
    return _carry_out(client, plan)


def shell(flags: argparse.Namespace, args: Sequence[str]) -> int:
    """Open a shell in the image."""
    request = _request(flags, args)
    if flags.dry_run or flags.json:
        return _show(
            plans.plan_shell(request, _host_for_show(request), _run_id(), flags.dev), flags.json
        )
    client, host = _client_and_host(request)
    plan = plans.plan_shell(request, host, _run_id(), flags.dev)
    _prepare_mounts(plan, host)
    _ensure_image(client, environment.tml_base(), _variant(plan), flags.build)
    return _carry_out(client, plan, pass_interrupt=True)


def test(flags: argparse.Namespace, args: Sequence[str]) -> int:
    """Run the tests that need no engine inside the dev image."""
    request = _request(flags, args)
    if flags.dry_run or flags.json:
        return _show(plans.plan_test(request, _host_for_show(request), _run_id()), flags.json)
    client, host = _client_and_host(request)
    plan = plans.plan_test(request, host, _run_id())
    _prepare_mounts(plan, host)
    _ensure_image(client, environment.tml_base(), _variant(plan), flags.build)
    return _carry_out(client, plan)


def build(flags: argparse.Namespace, args: Sequence[str]) -> int:
    """Build the image, or write what BuildKit needs."""
    from tml.docker import image
    from tml.docker.build import stage

    variant: Variant = "dev" if flags.dev else "gpu" if flags.gpu else "cpu"
    checkout = environment.tml_base()
    if flags.stage:
        folder = stage(checkout, variant)
        print(f"{image.LABEL_INPUTS}={image.hash_inputs(checkout, variant)}")
        logging.info("wrote %s for docker compose build and docker build", folder)
        return 0
    from tml.docker import engine

    client, _ = engine.connect()
    _ensure_image(
        client, checkout, variant, "always" if flags.force else "when-needed", say_current=True
    )
    return 0


def ping(flags: argparse.Namespace, args: Sequence[str]) -> int:
    """Say whether an engine answers."""
    from tml.docker import engine

    client, endpoint = engine.connect()
    print(f"engine {client.version()['Version']} at {endpoint.url}")
    return 0


# Between the verbs and the plan


def _request(flags: argparse.Namespace, args: Sequence[str]) -> Request:
    return Request(
        args=tuple(args),
        network=flags.network,
        gpus=flags.gpus,
        shm_size=flags.shm_size,
        memory=flags.memory,
        cpus=flags.cpus,
        user=flags.user,
        env=tuple(flags.env),
        mount=tuple(flags.mount),
        data=flags.data,
        config_mount=flags.config_mount,
        name=flags.name,
        detach=getattr(flags, "detach", False),
        nproc_per_node=getattr(flags, "nproc_per_node", None),
        stop_grace_s=flags.stop_grace,
    )


def _client_and_host(request: Request) -> tuple["APIClient", Host]:
    from tml.docker import engine

    client, endpoint = engine.connect()
    kind = "rootful" if request.user is not None else engine.kind_of(client)
    return client, _host(kind, None if endpoint.usual else endpoint.url)


def _host_for_show(request: Request) -> Host:
    """The host for a plan that is only shown: where no engine answers, an ordinary rootful one is
    assumed.
    """
    try:
        return _client_and_host(request)[1]
    except NoEngineError as error:
        logging.warning(
            "%s; showing what an ordinary engine would be told", str(error).splitlines()[0]
        )
        return _host("rootful", None)


def _host(kind: EngineKind, endpoint: str | None) -> Host:
    checkout, home = environment.tml_base(), environment.home()
    uid = os.getuid()
    return Host(
        checkout=checkout,
        home=home,
        cwd=Path.cwd(),
        uid=uid,
        gid=os.getgid(),
        user=_user_name(),
        environment=os.environ,
        terminal=is_terminal(),
        engine=kind,
        endpoint=endpoint,
        foreign_mounts=any(
            _owner(path) not in (uid, None) for path in (checkout, home / "tmp", home / ".config")
        ),
    )


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "user"


def _owner(path: Path) -> int | None:
    try:
        return path.stat().st_uid
    except OSError:
        return None


def _run_id() -> str:
    return os.urandom(4).hex()


def _variant(plan: Plan) -> Variant:
    return {name: variant for variant, name in plans.IMAGES.items()}[plan.image]


def _own_folders(plan: Plan, host: Host) -> list[Path]:
    """Sources of a plan that we make where they are missing: made by us, they are the caller's."""
    ours = {str(host.home / ".config"), str(host.home / "tmp")}
    return [Path(mount.source) for mount in plan.mounts if mount.source in ours]


def _prepare_mounts(plan: Plan, host: Host) -> None:
    for folder in _own_folders(plan, host):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise LauncherError(
                f"cannot make {folder}, which is mounted into the container: {error.strerror}"
            ) from error
    for mount in plan.mounts:
        if not Path(mount.source).exists():
            raise LauncherError(
                f"mount source {mount.source} (for {mount.target}) does not exist: make it, or "
                "mend the path"
            )
        if Path(mount.source).resolve().name in ("docker.sock", "podman.sock"):
            raise LauncherError(
                f"mount source {mount.source} is the engine's socket; it is not mounted"
            )


def _show(plan: Plan, as_json: bool) -> int:
    if as_json:
        print(json.dumps(plans.to_json(plan), indent=2))
        return 0
    for name in plans.secret_names(plan):
        if name not in os.environ:
            logging.warning("%s is not shown: export it before you paste this line", name)
    missing = [mount.source for mount in plan.mounts if not Path(mount.source).exists()]
    if missing:
        logging.warning(
            "run makes these if they are yours to have; before you paste this line: mkdir -p %s",
            " ".join(missing),
        )
    print(plans.to_shell(plan))
    return 0


def _ensure_image(
    client: "APIClient",
    checkout: Path,
    variant: Variant,
    policy: BuildPolicy,
    say_current: bool = False,
) -> None:
    from tml.docker import image

    name, there, wanted = (
        plans.IMAGES[variant],
        image.built_from(client, variant),
        image.hash_inputs(checkout, variant),
    )
    if policy == "never":
        if there is None:
            raise LauncherError(
                f"image {name} is not there, and --no-build was given: python -m tml.docker build"
            )
        if there != wanted:
            logging.warning(
                "image %s is older than the Dockerfile or the requirements; --no-build was given",
                name,
            )
    elif policy == "always" or there != wanted:
        why = (
            "asked for"
            if policy == "always"
            else "not there"
            if there is None
            else "its inputs changed"
        )
        logging.info("building %s (%s)", name, why)
        from tml.docker.build import build_image

        build_image(client, checkout, variant)
    elif say_current:
        logging.info("image %s is current", name)


def _carry_out(client: "APIClient", plan: Plan, pass_interrupt: bool = False) -> int:
    from tml.docker import engine

    _end_if_told()
    if plan.detach:
        print(engine.start_detached(client, plan))
        logging.info(
            "follow it: docker logs -f %s; stop it: docker stop %s; it is removed when it ends",
            plan.name,
            plan.name,
        )
        return 0
    logging.info("container %s from %s", plan.name, plan.image)
    return engine.run_attached(client, plan, pass_interrupt=pass_interrupt)


# Flags


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and what stands after `--`."""
    args: list[str] = []
    if "--" in argv:
        cut = argv.index("--")
        argv, args = argv[:cut], argv[cut + 1 :]
    flags = _parser().parse_args(argv)
    if args and flags.verb in ("build", "ping"):
        raise SystemExit(f"tml: {flags.verb} takes nothing after --")
    return flags, args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tml.docker", description="Train in containers.", allow_abbrev=False
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    run_parser = _verb(
        verbs, "run", run, "build the image if needed and train a project", RUN_EXAMPLES
    )
    run_parser.add_argument(
        "project", nargs="?", default="twhin", metavar="PROJECT", help="default: twhin"
    )
    _container_flags(run_parser)
    run_parser.add_argument(
        "--detach", action="store_true", help="print the container's name and leave it running"
    )
    run_parser.add_argument(
        "--nproc-per-node",
        metavar="N",
        help="processes that torchrun starts: a count, auto, gpu or cpu",
    )

    build_parser = _verb(verbs, "build", build, "build the image")
    which = build_parser.add_mutually_exclusive_group()
    which.add_argument("--gpu", action="store_true", help="the CUDA variant, local/torch:gpu")
    which.add_argument(
        "--dev", action="store_true", help="also the stage with the tests' tools, local/torch:dev"
    )
    build_parser.add_argument("--force", action="store_true", help="build although nothing changed")
    build_parser.add_argument(
        "--stage",
        action="store_true",
        help="only write .build/, from which `docker compose build` takes wheels",
    )

    shell_parser = _verb(verbs, "shell", shell, "a shell in the image, with the mounts of a run")
    _container_flags(shell_parser)
    shell_parser.add_argument("--dev", action="store_true", help="in local/torch:dev")

    _container_flags(_verb(verbs, "test", test, "the tests that need no engine, in the image"))
    _verb(verbs, "ping", ping, "say whether an engine answers")
    return parser


RUN_EXAMPLES = """examples:
  python -m tml.docker run                                   train twhin on the built-in graph
  python -m tml.docker run twhin --nproc-per-node 2          with two processes
  python -m tml.docker run --data /srv/graph -- --config_yaml_path=/data/config.yaml
  python -m tml.docker run --dry-run                         the docker run line that this is
"""


def _verb(
    verbs: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    function: object,
    what: str,
    more: str = "",
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        name,
        help=what,
        description=what,
        epilog=more,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(verb_function=function)
    return parser


def _container_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--network",
        default="host",
        metavar="NAME",
        help="host (default), bridge, none or a network's name",
    )
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
        help="NAME alone takes the value from here, unseen",
    )
    add("--mount", action="append", default=[], metavar="SRC:DST[:ro]", help="a further folder")
    add("--data", metavar="DIR", help="a folder to be seen, read-only, at /data")
    add(
        "--config-mount",
        choices=("ro", "rw", "none"),
        default="ro",
        help="~/.config in the container (default ro)",
    )
    add("--name", help="the container's name")
    add(
        "--stop-grace",
        type=int,
        default=plans.STOP_GRACE_S,
        metavar="S",
        help="seconds from SIGTERM to SIGKILL (45)",
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
        help="take the image as it is",
    )
    add(
        "--dry-run",
        action="store_true",
        help="print the docker run line that this is, and do nothing",
    )
    add("--json", action="store_true", help="print the plan, and do nothing")


if __name__ == "__main__":
    sys.exit(main())
