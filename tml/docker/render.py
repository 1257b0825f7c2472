"""A plan in the forms others take: the body that the engine's API is sent, the same `docker run`
typed by hand, JSON. Pure, as plan.py is.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tml.docker.plan import LABEL_OWNER, PIDS_LIMIT, UNITS, Gpus, Mount, Plan


def to_engine(plan: Plan, owner: str) -> dict[str, Any]:
    """The body of the engine's POST /containers/create. `owner` says which launcher will remove the
    container.
    """
    host_config: dict[str, Any] = {
        "Mounts": [
            {"Type": "bind", "Source": m.source, "Target": m.target, "ReadOnly": m.read_only}
            for m in plan.mounts
        ],
        "NetworkMode": plan.network,
        "Init": True,
        # The launcher removes it, which reads the exit status first.
        "AutoRemove": False,
        "ShmSize": plan.shm_bytes,
        "CapDrop": ["ALL"],
        "CapAdd": list(plan.cap_add),
        "SecurityOpt": ["no-new-privileges"],
        "PidsLimit": PIDS_LIMIT,
    }
    if plan.memory_bytes is not None:
        host_config["Memory"] = plan.memory_bytes
    if plan.cpus is not None:
        host_config["NanoCpus"] = round(plan.cpus * 1e9)
    if plan.gpus is not None:
        device = {
            "Capabilities": [["gpu"]],
            "Count": plan.gpus.count,
            "DeviceIDs": list(plan.gpus.ids) or None,
        }
        host_config["DeviceRequests"] = [device]
    attached = not plan.detach
    return {
        "Image": plan.image,
        "Cmd": list(plan.command),
        "WorkingDir": plan.workdir,
        "User": plan.user,
        "Env": [f"{v.name}={v.value}" for v in plan.env],
        "Labels": {**plan.labels, LABEL_OWNER: owner},
        "Tty": plan.tty,
        "OpenStdin": plan.interactive,
        "StdinOnce": plan.interactive and attached,
        "AttachStdin": plan.interactive and attached,
        "AttachStdout": attached,
        "AttachStderr": attached,
        "StopTimeout": plan.stop_grace_s,
        "HostConfig": host_config,
    }


def to_argv(plan: Plan) -> list[str]:
    """The same container as a `docker run` typed by hand. Secrets appear by name: docker takes
    their values itself.
    """
    argv = ["docker", *(["-H", plan.endpoint] if plan.endpoint else []), "run", "--rm"]
    if plan.detach:
        argv += ["-d"]
    argv += ["-i"] if plan.interactive and not plan.tty else []
    argv += ["-it"] if plan.tty else []
    argv += ["--init", "--name", plan.name]
    for mount in plan.mounts:
        argv += ["--mount", _mount_option(mount)]
    argv += ["-w", plan.workdir, "--user", plan.user]
    for variable in plan.env:
        argv += ["-e", variable.name if variable.secret else f"{variable.name}={variable.value}"]
    argv += ["--network", plan.network, "--shm-size", _size(plan.shm_bytes)]
    argv += ["--memory", _size(plan.memory_bytes)] if plan.memory_bytes is not None else []
    argv += ["--cpus", f"{plan.cpus:g}"] if plan.cpus is not None else []
    argv += ["--gpus", _gpus_option(plan.gpus)] if plan.gpus is not None else []
    argv += ["--cap-drop", "ALL"]
    for capability in plan.cap_add:
        argv += ["--cap-add", capability]
    argv += ["--security-opt", "no-new-privileges", "--pids-limit", str(PIDS_LIMIT)]
    argv += ["--stop-timeout", str(plan.stop_grace_s)]
    for name, value in plan.labels.items():
        argv += ["--label", f"{name}={value}"]
    return [*argv, plan.image, *plan.command]


def to_shell(plan: Plan) -> str:
    """`to_argv` in one line that a shell takes."""
    return shlex.join(to_argv(plan))


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON's types; the value of a secret is null."""
    data = asdict(plan)
    for variable in data["env"]:
        if variable["secret"]:
            variable["value"] = None
    data["labels"] = dict(plan.labels)
    return data


def secret_names(plan: Plan) -> Sequence[str]:
    """Names of the variables whose values are not shown."""
    return [variable.name for variable in plan.env if variable.secret]


def _mount_option(mount: Mount) -> str:
    fields = ["type=bind", f"source={mount.source}", f"target={mount.target}"]
    fields += ["readonly"] if mount.read_only else []
    # docker reads this option as one line of CSV: a path with a comma or a quote must be quoted.
    return ",".join(
        '"' + text.replace('"', '""') + '"' if re.search(r'[,"\n]', text) else text
        for text in fields
    )


def _gpus_option(gpus: Gpus) -> str:
    if gpus.ids:
        return f'"device={",".join(gpus.ids)}"'
    return "all" if gpus.count == -1 else str(gpus.count)


def _size(size: int) -> str:
    for suffix in "gmk":
        if size % UNITS[suffix] == 0:
            return f"{size // UNITS[suffix]}{suffix}"
    return str(size)
