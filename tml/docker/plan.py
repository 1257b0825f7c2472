"""From a request to a plan: what container would run, as plain data. Pure: nothing is read, made or
started.

`plan_run`, `plan_shell` and `plan_test` compute a `Plan`. A plan is carried out by engine.py
(`to_engine` is what the engine's API is sent), printed as the same `docker run` typed by hand
(`to_shell`), or as JSON (`to_json`).
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tml.docker.checkout import Project
from tml.docker.errors import LauncherError
from tml.docker.users import EngineKind, container_user
from tml.machines import environment

Variant = Literal["cpu", "gpu", "dev"]
IMAGES: dict[Variant, str] = {
    "cpu": "local/torch",
    "gpu": "local/torch:gpu",
    "dev": "local/torch:dev",
}

CHECKOUT = "/usr/src/app/tml"
WORKDIR = "/usr/src/app"
CONFIG = "/root/.config"
RUNS = "/root/tmp"
DATA = "/data"

SHM_BYTES = 2 << 30
"""/dev/shm: the engine's 64 MB ends a data loader in a bus error. It is a limit, used only as it is
filled.
"""
STOP_GRACE_S = 45
"""torchelastic gives its ranks 30 s after a SIGTERM; the engine's default of 10 s would cut a
checkpoint short.
"""
PIDS_LIMIT = 8192
"""Against a fork bomb; a rank with its data loader and thread pools takes some hundreds."""

LABEL_RUN, LABEL_PROJECT, LABEL_ROLE, LABEL_OWNER = (
    "tml.run",
    "tml.project",
    "tml.role",
    "tml.owner",
)

_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


@dataclass(frozen=True, kw_only=True)
class Mount:
    """A folder of the host in the container."""

    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Variable:
    """One environment variable; `secret` ones are passed on and never shown."""

    name: str
    value: str
    secret: bool = False


@dataclass(frozen=True, kw_only=True)
class Gpus:
    """Which GPUs: a count (-1 is all), or ids."""

    count: int = 0
    ids: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Host:
    """What planning must know of the machine and of the caller; gathered by the caller of this
    module.
    """

    checkout: Path
    home: Path
    cwd: Path
    uid: int
    gid: int
    user: str
    environment: Mapping[str, str]
    terminal: bool
    """stdin is a terminal that this process may read."""
    engine: EngineKind = "rootful"
    endpoint: str | None = None
    """Where the engine listens, when `docker` typed without -H would look elsewhere."""
    foreign_mounts: bool = False
    """Some mounted folder belongs to somebody other than the caller."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for, as typed; None is "not said"."""

    args: tuple[str, ...] = ()
    network: str = "host"
    gpus: str | None = None
    shm_size: str | None = None
    memory: str | None = None
    cpus: float | None = None
    user: str | None = None
    env: tuple[str, ...] = ()
    mount: tuple[str, ...] = ()
    data: str | None = None
    config_mount: Literal["ro", "rw", "none"] = "ro"
    name: str | None = None
    detach: bool = False
    nproc_per_node: str | None = None
    stop_grace_s: int = STOP_GRACE_S


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One container, complete: two equal plans start two equal containers."""

    image: str
    command: tuple[str, ...]
    name: str
    run_id: str
    workdir: str
    env: tuple[Variable, ...]
    mounts: tuple[Mount, ...]
    network: str
    user: str
    interactive: bool
    """stdin is passed on."""
    tty: bool
    detach: bool
    shm_bytes: int = SHM_BYTES
    memory_bytes: int | None = None
    cpus: float | None = None
    gpus: Gpus | None = None
    cap_add: tuple[str, ...] = ()
    stop_grace_s: int = STOP_GRACE_S
    labels: Mapping[str, str] = field(default_factory=dict)
    endpoint: str | None = None


def plan_run(request: Request, host: Host, project: Project, run_id: str) -> Plan:
    """The container that trains `project`: the contract of the design, as flags change it."""
    gpus = parse_gpus(request.gpus) if request.gpus is not None else None
    plan = _plan(
        request,
        host,
        variant="gpu" if gpus else "cpu",
        name=request.name or f"tml-{project.name}-{run_id}",
        run_id=run_id,
        command=("bash", f"tml/{project.script}", *request.args),
    )
    tty = host.terminal and not request.detach
    labels = {**plan.labels, LABEL_PROJECT: project.path}
    return replace(plan, gpus=gpus, tty=tty, interactive=tty, detach=request.detach, labels=labels)


def plan_shell(request: Request, host: Host, run_id: str, dev: bool = False) -> Plan:
    """An interactive shell in the image, with the mounts and the environment of a run."""
    gpus = parse_gpus(request.gpus) if request.gpus is not None else None
    variant: Variant = "dev" if dev else "gpu" if gpus else "cpu"
    name = request.name or f"tml-shell-{run_id}"
    plan = _plan(request, host, variant, name, run_id, command=("bash", *request.args))
    return replace(plan, gpus=gpus, interactive=True, tty=host.terminal)


def plan_test(request: Request, host: Host, run_id: str) -> Plan:
    """The tests that need no engine, in the dev image, on the mounted checkout."""
    arguments = request.args or ("-m", "not docker", "tests")
    name = request.name or f"tml-test-{run_id}"
    command = ("python", "-m", "pytest", "-o", "cache_dir=/tmp/pytest", *arguments)
    plan = _plan(request, host, "dev", name, run_id, command)
    return replace(plan, workdir=CHECKOUT, tty=host.terminal, interactive=host.terminal)


def _plan(
    request: Request, host: Host, variant: Variant, name: str, run_id: str, command: tuple[str, ...]
) -> Plan:
    user = container_user(host.engine, host.uid, host.gid, host.user, request.user)
    if request.stop_grace_s < 0:
        raise LauncherError(f"--stop-grace {request.stop_grace_s}: expected 0 or more seconds")
    if request.cpus is not None and request.cpus <= 0:
        raise LauncherError(f"--cpus {request.cpus:g}: expected more than 0")
    if not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+", name):
        raise LauncherError(
            f"--name {name!r}: expected letters, digits, '_', '.', '-', two at least"
        )
    return Plan(
        image=IMAGES[variant],
        command=command,
        name=name,
        run_id=run_id,
        workdir=WORKDIR,
        env=_environment(request, host, user.name),
        mounts=_mounts(request, host),
        network=request.network,
        user=user.ids,
        interactive=False,
        tty=False,
        detach=False,
        shm_bytes=parse_bytes("--shm-size", request.shm_size) if request.shm_size else SHM_BYTES,
        memory_bytes=parse_bytes("--memory", request.memory) if request.memory else None,
        cpus=request.cpus,
        # Root without any capability may not write to other people's files, as the caller, root,
        # may outside.
        cap_add=("DAC_OVERRIDE",)
        if user.ids.partition(":")[0] == "0" and host.foreign_mounts
        else (),
        stop_grace_s=request.stop_grace_s,
        labels={LABEL_RUN: run_id, LABEL_ROLE: "chief"},
        endpoint=host.endpoint,
    )


def _environment(request: Request, host: Host, user_name: str) -> tuple[Variable, ...]:
    defaults = {
        environment.PYTHONPATH: f"{WORKDIR}/",
        environment.SPEC_TYPE: "chief",
        # A user id that the image does not know: getpass and torch look here before they raise
        # KeyError.
        environment.HOME: "/root",
        environment.USER: user_name,
        environment.LOGNAME: user_name,
        environment.TORCHINDUCTOR_CACHE_DIR: "/tmp/torchinductor",
    }
    variables = {name: Variable(name=name, value=value) for name, value in defaults.items()}
    if request.nproc_per_node is not None:
        count = request.nproc_per_node
        if not re.fullmatch(r"[1-9]\d*|auto|gpu|cpu", count):
            raise LauncherError(
                f"--nproc-per-node {count!r}: expected a count of processes, or auto, gpu, cpu"
            )
        name = environment.PET_NPROC_PER_NODE
        variables[name] = Variable(name=name, value=count)
    for text in request.env:
        name, given, value = text.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", name):
            raise LauncherError(f"--env {name!r}: expected NAME or NAME=VALUE")
        if given:
            variables[name] = Variable(
                name=name, value=value, secret=environment.is_secret_name(name)
            )
        elif name in host.environment:
            # By name only: whoever asks for that does not want the value shown, whatever it is
            # called.
            variables[name] = Variable(name=name, value=host.environment[name], secret=True)
        else:
            # As docker does it, also for a name that had a default.
            variables.pop(name, None)
    return tuple(variables.values())


def _mounts(request: Request, host: Host) -> tuple[Mount, ...]:
    mounts = [Mount(source=str(host.checkout), target=CHECKOUT)]
    if request.config_mount != "none":
        config = str(host.home / ".config")
        mounts.append(Mount(source=config, target=CONFIG, read_only=request.config_mount == "ro"))
    mounts.append(Mount(source=str(host.home / "tmp"), target=RUNS))
    if request.data is not None:
        mounts.append(Mount(source=_absolute(request.data, host), target=DATA, read_only=True))
    mounts += [parse_mount(text, host) for text in request.mount]
    # One mount per target: a later one, which the caller typed, takes the place of a default.
    return tuple({mount.target: mount for mount in mounts}.values())


def parse_mount(text: str, host: Host) -> Mount:
    """A mount from SRC:DST[:ro|rw]; SRC may begin with ~ or be relative to where the launcher was
    called.
    """
    parts = text.split(":")
    mode = parts.pop() if len(parts) == 3 else "rw"
    if (
        len(parts) != 2
        or mode not in ("ro", "rw")
        or not all(parts)
        or not parts[1].startswith("/")
    ):
        raise LauncherError(
            f"--mount {text!r}: expected SRC:DST or SRC:DST:ro with an absolute DST"
        )
    source, target = _absolute(parts[0], host), parts[1].rstrip("/") or "/"
    if target == "/":
        raise LauncherError(f"--mount {text!r}: DST cannot be the container's root")
    if Path(source).name in ("docker.sock", "podman.sock"):
        raise LauncherError(
            f"--mount {text!r}: who holds the engine's socket is root on this machine; it is not "
            "mounted"
        )
    return Mount(source=source, target=target, read_only=mode == "ro")


def _absolute(source: str, host: Host) -> str:
    if source == "~" or source.startswith("~/"):
        source = str(host.home) + source[1:]
    # Not resolve(): that would look at the disk.
    return _normal(host.cwd / source)


def _normal(path: Path) -> str:
    parts: list[str] = []
    for part in path.parts[1:]:
        if part == "..":
            parts = parts[:-1]
        else:
            parts.append(part)
    return "/" + "/".join(parts)


def parse_bytes(flag: str, text: str) -> int:
    """Bytes from 512m, 2g, 1.5g, 1048576."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([bkmgt]?)b?", text.strip().lower())
    size = int(float(match.group(1)) * _UNITS[match.group(2)]) if match else 0
    if size <= 0:
        raise LauncherError(f"{flag} {text!r}: expected a size such as 512m or 2g")
    return size


def parse_gpus(text: str) -> Gpus:
    """GPUs from all, a count, a list of ids 0,1, or device=ID[,ID]."""
    if text == "all":
        return Gpus(count=-1)
    if re.fullmatch(r"[1-9]\d*", text):
        return Gpus(count=int(text))
    ids = tuple(part.strip() for part in text.removeprefix("device=").split(","))
    if all(re.fullmatch(r"\d+|GPU-[\w-]+|MIG-[\w-]+", part) for part in ids) and text != "0":
        return Gpus(ids=ids)
    raise LauncherError(
        f"--gpus {text!r}: expected all, a count of 1 or more, ids such as 0,1, or device=0 for "
        "one id"
    )


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
        # A detached container has nobody to remove it; for others the launcher reads the exit
        # status first.
        "AutoRemove": plan.detach,
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
        "Labels": {**plan.labels, **({} if plan.detach else {LABEL_OWNER: owner})},
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
        if size % _UNITS[suffix] == 0:
            return f"{size // _UNITS[suffix]}{suffix}"
    return str(size)
