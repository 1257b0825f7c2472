"""A plan, or a gang of them, in the forms others take: the body that the engine's API is sent, the
same `docker run` typed by hand, JSON. Pure, as plan.py is.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tml.docker import secrets
from tml.docker.plan import HOME, LABEL_OWNER, PIDS_LIMIT, UNITS, Gang, Gpus, Mount, Plan
from tml.machines import environment

LOOPBACK = "127.0.0.1"
"""Published ports are for this machine alone."""
TMPFS = {"/tmp": "2g", HOME: "1g"}
"""What can be written to under a read-only root, and how much; as /dev/shm, used only as filled."""


def to_engine(plan: Plan, owner: str, secrets_file: Path | None = None) -> dict[str, Any]:
    """The body of the engine's POST /containers/create. `owner` says which launcher will remove the
    container; `secrets_file` is what secrets.py staged, where there are any.
    """
    assert (secrets_file is not None) == bool(secret_names(plan))
    env = [f"{v.name}={v.value}" for v in plan.env if not v.secret]
    mounts, command = plan.mounts, list(plan.command)
    if secrets_file is not None:
        env.append(f"{environment.BASH_ENV}={secrets.FILE}")
        mounts += (Mount(source=str(secrets_file), target=secrets.FILE, read_only=True),)
        command = command if secrets.is_read_by(command) else secrets.wrapped(command)
    host_config: dict[str, Any] = {
        "Mounts": [
            {"Type": "bind", "Source": m.source, "Target": m.target, "ReadOnly": m.read_only}
            for m in mounts
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
    if plan.read_only_root:
        host_config |= {"ReadonlyRootfs": True, "Tmpfs": _tmpfs(plan)}
    if plan.user_namespace is not None:
        host_config["UsernsMode"] = plan.user_namespace
    if plan.ports:
        host_config["PortBindings"] = _port_bindings(plan)
    attached = not plan.detach
    body: dict[str, Any] = {
        "Image": plan.image,
        "Cmd": command,
        "WorkingDir": plan.workdir,
        "User": plan.user,
        "Env": env,
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
    if plan.hostname is not None:
        body["Hostname"] = plan.hostname
    if plan.ports:
        body["ExposedPorts"] = {port: {} for port in host_config["PortBindings"]}
    if plan.aliases:
        endpoint = {"Aliases": list(plan.aliases)}
        body["NetworkingConfig"] = {"EndpointsConfig": {plan.network: endpoint}}
    return body


def to_argv(plan: Plan, *, remove: bool = True) -> list[str]:
    """The same container as a `docker run` typed by hand. Secrets appear by name: docker takes
    their values itself. `remove`: the engine removes it when it ends.
    """
    argv = [*_docker(plan), "run"]
    argv += ["--rm"] if remove else []
    argv += ["-d"] if plan.detach else []
    argv += ["-i"] if plan.interactive and not plan.tty else []
    argv += ["-it"] if plan.tty else []
    argv += ["--init", "--name", plan.name]
    for mount in plan.mounts:
        argv += ["--mount", _mount_option(mount)]
    argv += ["-w", plan.workdir, "--user", plan.user]
    argv += ["--userns", plan.user_namespace] if plan.user_namespace is not None else []
    for variable in plan.env:
        argv += ["-e", variable.name if variable.secret else f"{variable.name}={variable.value}"]
    argv += ["--network", plan.network]
    argv += ["--hostname", plan.hostname] if plan.hostname is not None else []
    for alias in plan.aliases:
        argv += ["--network-alias", alias]
    for port in plan.ports:
        argv += ["--publish", f"{LOOPBACK}:{port.host}:{port.container}"]
    argv += ["--shm-size", _size(plan.shm_bytes)]
    argv += ["--memory", _size(plan.memory_bytes)] if plan.memory_bytes is not None else []
    argv += ["--cpus", f"{plan.cpus:g}"] if plan.cpus is not None else []
    argv += ["--gpus", _gpus_option(plan.gpus)] if plan.gpus is not None else []
    argv += ["--cap-drop", "ALL"]
    for capability in plan.cap_add:
        argv += ["--cap-add", capability]
    argv += ["--security-opt", "no-new-privileges", "--pids-limit", str(PIDS_LIMIT)]
    argv += ["--stop-timeout", str(plan.stop_grace_s)]
    if plan.read_only_root:
        argv += ["--read-only"]
        for target, options in _tmpfs(plan).items():
            argv += ["--tmpfs", f"{target}:{options}"]
    return [*argv, *_label_options(plan.labels), plan.image, *plan.command]


def to_shell(plan: Plan) -> str:
    """`to_argv` in one line that a shell takes."""
    return shlex.join(to_argv(plan))


def gang_to_shell(gang: Gang) -> str:
    """The lines of a shell that make the network, start each container, follow the chief, wait for
    all, and remove everything. What they lack of `up`: the first failure does not stop the others.
    """
    docker, labels = _docker(gang.members[0]), _label_options(gang.labels)
    ending = [member.name for member in gang.members if not member.is_service]
    every = [member.name for member in gang.members]
    lines = [
        *([[*docker, "network", "create", *labels, gang.network]] if gang.network else []),
        # Not --rm: `docker wait` would find those that end before it gone.
        *(to_argv(member, remove=False) for member in gang.members),
        [*docker, "logs", "-f", gang.members[0].name],
        [*docker, "wait", *ending],
        [*docker, "rm", "--force", "--volumes", *every],
        *([[*docker, "network", "rm", gang.network]] if gang.network else []),
    ]
    return "\n".join(shlex.join(line) for line in lines)


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON's types; the value of a secret is null."""
    data = asdict(plan)
    for variable in data["env"]:
        if variable["secret"]:
            variable["value"] = None
    data["labels"] = dict(plan.labels)
    return data


def gang_to_json(gang: Gang) -> dict[str, Any]:
    """The gang as JSON's types; its members are as `to_json` has them."""
    return {
        "job": gang.job,
        "run_id": gang.run_id,
        "network": gang.network,
        "labels": dict(gang.labels),
        "max_restarts": gang.max_restarts,
        "detach": gang.detach,
        "logs": gang.logs,
        "members": [to_json(member) for member in gang.members],
    }


def secret_names(plan: Plan) -> Sequence[str]:
    """Names of the variables whose values are not shown."""
    return [variable.name for variable in plan.env if variable.secret]


def _docker(plan: Plan) -> list[str]:
    if plan.user_namespace is not None:
        # docker's own --userns knows "host" and nothing else.
        return ["podman"]
    return ["docker", *(["-H", plan.endpoint] if plan.endpoint else [])]


def _label_options(labels: Mapping[str, str]) -> list[str]:
    return [word for name, value in labels.items() for word in ("--label", f"{name}={value}")]


def _tmpfs(plan: Plan) -> dict[str, str]:
    mounted = {mount.target for mount in plan.mounts}
    # exec: torch.compile loads what it has compiled from there; the engine's default is noexec.
    return {
        target: f"rw,exec,nosuid,nodev,mode=1777,size={size}"
        for target, size in TMPFS.items()
        if target not in mounted
    }


def _port_bindings(plan: Plan) -> dict[str, list[dict[str, str]]]:
    bindings: dict[str, list[dict[str, str]]] = {}
    for port in plan.ports:
        binding = {"HostIp": LOOPBACK, "HostPort": str(port.host)}
        bindings.setdefault(f"{port.container}/tcp", []).append(binding)
    return bindings


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
