"""The verbs that start containers: run, up, shell, test; and build, ping. A request is gathered, a
plan is computed, then shown or carried out.
"""

import argparse
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tml.docker import plan as plans
from tml.docker import render, signals
from tml.docker.checkout import Project, find_project
from tml.docker.errors import LauncherError, NoEngineError, UsageError
from tml.docker.owner import user_name
from tml.docker.plan import Gang, Host, Plan, Request, Variant
from tml.docker.terminal import is_terminal
from tml.docker.users import EngineInfo, engine_kind, lacks_gpus
from tml.machines import environment

if TYPE_CHECKING:
    from docker import APIClient

    from tml.docker.engine import Note

BuildPolicy = Literal["when-needed", "always", "never"]


def run(flags: argparse.Namespace, args: Sequence[str]) -> int:
    """Train a project in a container."""
    project = find_project(environment.tml_base(), flags.project)
    request = _request(flags, args)
    if flags.dry_run or flags.json:
        host = host_for_show(request)
        return _show(plans.plan_run(request, host, project, _run_id()), host, flags.json)
    client, host = _client_and_host(request)
    plan = plans.plan_run(request, host, project, _run_id())
    _make_ready(client, [plan], host, flags.build)
    if plan.detach:
        # In the background it is a gang of one.
        return _detach(plans.gang_of_one(plan, _logs(request, plan, host, project)), host, "run")
    from tml.docker.engine import Note

    # What a terminal shows, with colours and progress bars, is no log.
    logs = None if plan.tty else _logs(request, plan, host, project)
    return _carry_out(client, plan, Note(endpoint=_engine(host), logs=logs))


def up(flags: argparse.Namespace, args: Sequence[str]) -> int:
    """Train a project in several containers, as one job."""
    project = find_project(environment.tml_base(), flags.project)
    request = _request(flags, args)
    if flags.dry_run or flags.json:
        host = host_for_show(request)
        return _show_gang(plans.plan_up(request, host, project, _run_id()), host, flags.json)
    client, host = _client_and_host(request)
    gang = plans.plan_up(request, host, project, _run_id())
    _make_ready(client, gang.members, host, flags.build)
    if gang.detach:
        return _detach(gang, host, "up")
    return _carry_out_gang(client, gang, host, timestamps=flags.timestamps)


def shell(flags: argparse.Namespace, args: Sequence[str]) -> int:
    """Open a shell in the image."""
    request = _request(flags, args)
    if flags.dry_run or flags.json:
        host = host_for_show(request)
        return _show(plans.plan_shell(request, host, _run_id(), flags.dev), host, flags.json)
    client, host = _client_and_host(request)
    plan = plans.plan_shell(request, host, _run_id(), flags.dev)
    _make_ready(client, [plan], host, flags.build)
    return _carry_out(client, plan, pass_interrupt=True)


def test(flags: argparse.Namespace, args: Sequence[str]) -> int:
    """Run the tests that need no engine inside the dev image."""
    request = _request(flags, args)
    if flags.dry_run or flags.json:
        host = host_for_show(request)
        return _show(plans.plan_test(request, host, _run_id()), host, flags.json)
    client, host = _client_and_host(request)
    plan = plans.plan_test(request, host, _run_id())
    _make_ready(client, [plan], host, flags.build)
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
    from tml.docker.connection import connect

    client, _ = connect()
    _ensure_image(
        client, checkout, variant, "always" if flags.force else "when-needed", say_current=True
    )
    return 0


def ping(flags: argparse.Namespace, args: Sequence[str]) -> int:
    """Say whether an engine answers."""
    from tml.docker.connection import connect

    client, endpoint = connect()
    print(f"engine {client.version()['Version']} at {endpoint.url}")
    return 0


# Between the verbs and the plan


def _make_ready(
    client: "APIClient", members: Sequence[Plan], host: Host, policy: BuildPolicy
) -> None:
    """What containers of one image need before they are made: GPUs, folders, the image."""
    _need_gpus(members[0], host)
    for plan in members:
        prepare_mounts(plan, host)
    _ensure_image(client, host.checkout, _variant(members[0]), policy)


def _request(flags: argparse.Namespace, args: Sequence[str]) -> Request:
    for name in flags.env:
        if plans.VARIABLE_NAME.fullmatch(name) and name not in os.environ:
            logging.warning("%s is not set here: the container does without it", name)
    return Request(
        args=tuple(args),
        # `up` has no such flag: its containers have a network of their own.
        network=getattr(flags, "network", "host"),
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
        publish=tuple(flags.publish),
        read_only=flags.read_only,
        workers=getattr(flags, "workers", 1),
        datasetworkers=getattr(flags, "datasetworkers", 0),
        evaluator=getattr(flags, "evaluator", False),
        max_restarts=getattr(flags, "max_restarts", 0),
    )


def _client_and_host(request: Request) -> tuple["APIClient", Host]:
    from tml.docker.connection import connect, describe

    client, endpoint = connect()
    return client, _host(describe(client, endpoint), None if endpoint.usual else endpoint.url)


def _engine(host: Host) -> str:
    """Address of the engine, for the record of a job."""
    return host.engine_url or ""


def host_for_show(request: Request) -> Host:
    """The host for a plan that is only shown: where no engine answers, an ordinary rootful one is
    assumed.
    """
    try:
        return _client_and_host(request)[1]
    except NoEngineError as error:
        logging.warning("%s; showing what an ordinary engine would be told", error.brief)
        usual = EngineInfo(url="unix://", here=False, num_processors=os.cpu_count() or 1)
        return _host(usual, None)


def _host(info: EngineInfo, endpoint: str | None) -> Host:
    checkout, home = environment.tml_base(), environment.home()
    uid = os.getuid()
    return Host(
        checkout=checkout,
        home=home,
        cwd=Path.cwd(),
        uid=uid,
        gid=os.getgid(),
        user=user_name(),
        environment=os.environ,
        terminal=is_terminal(),
        engine=engine_kind(info),
        engine_url=info.url,
        num_processors=info.num_processors,
        endpoint=endpoint,
        lacks_gpus=lacks_gpus(info),
        foreign_mounts=any(
            _owner(path) not in (uid, None) for path in (checkout, home / "tmp", home / ".config")
        ),
    )


def _owner(path: Path) -> int | None:
    try:
        return path.stat().st_uid
    except OSError:
        return None


def _run_id() -> str:
    return os.urandom(4).hex()


def _variant(plan: Plan) -> Variant:
    return {name: variant for variant, name in plans.IMAGES.items()}[plan.image]


def _no_gpus() -> LauncherError:
    from tml.docker.container import no_gpu_runtime

    return no_gpu_runtime("it lists neither a runtime nvidia nor a GPU among its CDI devices")


def _need_gpus(plan: Plan, host: Host) -> None:
    """An error where the engine would refuse GPUs at the start, after gigabytes of image."""
    if plan.gpus and host.lacks_gpus:
        raise _no_gpus()


def _own_folders(plan: Plan, host: Host) -> list[Path]:
    """Sources of a plan that we make where they are missing: made by us, they are the caller's."""
    ours = {str(host.home / ".config"), str(host.home / "tmp")}
    return [Path(mount.source) for mount in plan.mounts if mount.source in ours]


def prepare_mounts(plan: Plan, host: Host) -> None:
    for folder in _own_folders(plan, host):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise LauncherError(
                f"cannot make {folder}, which is mounted into the container: {error.strerror}"
            ) from error
    for mount in plan.mounts:
        if not Path(mount.source).exists():
            raise UsageError(
                f"mount source {mount.source} (for {mount.target}) does not exist: make it, or "
                "mend the path"
            )
        # The plan has looked at the path; here, at where it leads.
        plans.refuse_socket(str(Path(mount.source).resolve()), host, mount.source)


def _show(plan: Plan, host: Host, as_json: bool) -> int:
    if as_json:
        print(json.dumps(render.to_json(plan), indent=2))
        return 0
    _say_what_a_paste_needs(plan, host)
    print(render.to_shell(plan))
    return 0


def _show_gang(gang: Gang, host: Host, as_json: bool) -> int:
    if as_json:
        print(json.dumps(render.gang_to_json(gang), indent=2))
        return 0
    _say_what_a_paste_needs(gang.members[0], host)
    print(render.gang_to_shell(gang))
    return 0


def _say_what_a_paste_needs(plan: Plan, host: Host) -> None:
    if plan.gpus and host.lacks_gpus:
        logging.warning("%s", _no_gpus())
    for name in render.secret_names(plan):
        if name not in os.environ:
            logging.warning("%s is not shown: export it before you paste this", name)
    missing = [mount.source for mount in plan.mounts if not Path(mount.source).exists()]
    if missing:
        logging.warning(
            "run and up make these if they are yours to have; before you paste this: mkdir -p %s",
            " ".join(missing),
        )


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
                f"image {name} is not there, and --no-build was given: {plans.BUILDS[variant]}"
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
        spared = "; --no-build takes the one that is there" if why == "its inputs changed" else ""
        logging.info("building %s (%s)%s", name, why, spared)
        from tml.docker.build import build_image

        build_image(client, checkout, variant, even_if_current=policy == "always")
    elif say_current:
        logging.info("image %s is current", name)


def _logs(request: Request, plan: Plan, host: Host, project: Project) -> str:
    folder = plans.run_folder(request.args, plan.mounts, host.home, project.name)
    return f"{folder}/logs/{plan.job}"


def _carry_out(
    client: "APIClient", plan: Plan, note: "Note | None" = None, *, pass_interrupt: bool = False
) -> int:
    from tml.docker import engine

    signals.end_if_told()
    logging.info("container %s from %s", plan.name, plan.image)
    return engine.run_attached(client, plan, note=note, pass_interrupt=pass_interrupt)


def _carry_out_gang(client: "APIClient", gang: Gang, host: Host, timestamps: bool) -> int:
    from tml.docker import gang as gangs

    signals.end_if_told()
    members = ", ".join(member.member for member in gang.members)
    logging.info("job %s from %s: %s", gang.job, gang.members[0].image, members)
    logging.info("each one's output is also kept in %s", gang.logs)
    told = gangs.Told(verb="up", endpoint=_engine(host), timestamps=timestamps)
    return gangs.run(client, gang, told)


def _detach(gang: Gang, host: Host, verb: Literal["run", "up"]) -> int:
    from tml.docker import supervisor

    signals.end_if_told()
    return supervisor.start(gang, _engine(host), verb)
