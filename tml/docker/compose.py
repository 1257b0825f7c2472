"""The verb compose-env: .env, from which docker-compose.yml is filled.

The values are those of the plan of `up` for the same flags, so that the two cannot drift apart. In
the file they stand between two marks; what else it holds is the user's and stays.
"""

import argparse
import logging
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from tml.docker import image, launch
from tml.docker import plan as plans
from tml.docker.checkout import find_project
from tml.docker.errors import LauncherError
from tml.docker.plan import Gang, Host, Request
from tml.machines import environment

BEGIN = "# >>> tml: written by `python -m tml.docker compose-env`, which writes these lines anew"
END = "# <<< tml"
PROFILES = ("datasetworker", "evaluator", "tensorboard")
"""Services that start only when they are asked for."""


def write_env(flags: argparse.Namespace, args: Sequence[str]) -> int:
    """Write .env, and make the folders that are mounted as the caller's."""
    checkout = environment.tml_base()
    project = find_project(checkout, flags.project)
    request = Request(
        args=tuple(args),
        shm_size=flags.shm_size,
        memory=flags.memory,
        cpus=flags.cpus,
        data=flags.data,
        nproc_per_node=flags.nproc_per_node,
        workers=flags.workers,
        # The service datasetworker is one container.
        datasetworkers=int("datasetworker" in flags.profile),
        evaluator="evaluator" in flags.profile,
    )
    host = launch.host_for_show(request)
    gang = plans.plan_up(request, host, project, "compose")
    values = compose_values(gang, host, flags.profile)
    values[environment.TML_IMAGE_INPUTS] = image.hash_inputs(checkout, "cpu")
    lines = [f"{name}={_quoted(value)}" for name, value in values.items()]
    if flags.output == "-":
        print("\n".join(lines))
        return 0
    launch.prepare_mounts(gang.members[0], host)
    file = Path(flags.output) if flags.output else checkout / ".env"
    _write(file, lines)
    where = "" if file == checkout / ".env" else f" --env-file {shlex.quote(str(file))}"
    logging.info("wrote %s; next, in %s: docker compose%s up", file, checkout, where)
    return 0


def compose_values(gang: Gang, host: Host, profiles: Sequence[str] = ()) -> dict[str, str]:
    """What docker-compose.yml takes from the environment, for the containers of `gang`."""
    chief = gang.members[0]
    variables = {variable.name: variable.value for variable in chief.env}
    _, script, *arguments = chief.command
    values = {
        environment.TML_USER: chief.user,
        environment.TML_USER_NAME: variables[environment.USER],
        environment.TML_HOME: str(host.home),
        environment.TML_SCRIPT: script.removeprefix("tml/"),
        environment.TML_ARGS: shlex.join(arguments),
        environment.TML_WORKERS: str(sum(member.role == "worker" for member in gang.members)),
        environment.TML_MACHINE_SHARE: variables[environment.TML_MACHINE_SHARE],
        environment.TML_NPROC_PER_NODE: variables.get(environment.PET_NPROC_PER_NODE, "1"),
        environment.TML_SHM_SIZE: str(chief.shm_bytes),
        environment.TML_MEMORY: str(chief.memory_bytes or 0),
        environment.TML_CPUS: f"{chief.cpus or 0:g}",
    }
    for mount in chief.mounts:
        if mount.target == plans.DATA:
            values[environment.TML_DATA] = mount.source
    if "datasetworker" in profiles:
        address = f"datasetworker:{environment.DATASETWORKER_PORT}"
        values[environment.TML_DATASETWORKERS] = address
    if profiles:
        values[environment.COMPOSE_PROFILES] = ",".join(profiles)
    return values


def _quoted(value: str) -> str:
    """As a value in .env, where `$NAME` in double quotes would be filled in."""
    if re.fullmatch(r"[\w./:,@%+=-]*", value):
        return value
    return '"' + re.sub(r'([\\"$])', r"\\\1", value) + '"'


def _write(file: Path, lines: Sequence[str]) -> None:
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        before = file.read_text() if file.exists() else ""
        text = merged(before, lines)
        temporary.write_text(text)
        temporary.replace(file)
    except OSError as error:
        raise LauncherError(f"cannot write {file}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
    for name in _set_outside(text, lines):
        logging.warning(
            "%s also sets %s outside of our lines: of two lines the last one counts", file, name
        )


def merged(before: str, lines: Sequence[str]) -> str:
    """The text `before` with `lines` between the marks: where they were, else at the end."""
    block = "\n".join([BEGIN, *lines, END]) + "\n"
    start, end = before.find(BEGIN), before.find(END)
    if 0 <= start < end:
        rest = before[end + len(END) :].removeprefix("\n")
        return before[:start] + block + rest
    if before and not before.endswith("\n"):
        before += "\n"
    return before + block


def _set_outside(text: str, lines: Sequence[str]) -> list[str]:
    own = text[: text.index(BEGIN)] + text[text.index(END) :]
    ours = {line.partition("=")[0] for line in lines}
    return sorted(ours & set(re.findall(r"^\s*(?:export\s+)?(\w+)\s*=", own, re.MULTILINE)))
