"""From a request to a plan: what container would run, as plain data. Pure: nothing is read, made or
started.

`plan_run`, `plan_shell` and `plan_test` compute a `Plan`, `plan_up` a `Gang` of several. engine.py
and gang.py carry them out; render.py prints them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath, PurePosixPath
from typing import Literal

from tml.docker.checkout import Project
from tml.docker.errors import UsageError
from tml.docker.users import EngineKind, container_user
from tml.machines import environment
from tml.machines.environment import Role

Variant = Literal["cpu", "gpu", "dev"]
IMAGES: dict[Variant, str] = {
    "cpu": "local/torch",
    "gpu": "local/torch:gpu",
    "dev": "local/torch:dev",
}
BUILDS: dict[Variant, str] = {
    "cpu": "python -m tml.docker build",
    "gpu": "python -m tml.docker build --gpu",
    "dev": "python -m tml.docker build --dev",
}
"""What makes each of them."""

VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")

CHECKOUT = "/usr/src/app/tml"
WORKDIR = "/usr/src/app"
HOME = "/root"
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

LABEL_RUN, LABEL_JOB, LABEL_PROJECT = "tml.run", "tml.job", "tml.project"
LABEL_ROLE, LABEL_INDEX, LABEL_OWNER = "tml.role", "tml.index", "tml.owner"
LABEL_USER = "tml.user"
"""Login name of who started it."""
"""What a container, and the network of a job, can be found by. The owner is that of owner.py."""

RENDEZVOUS_PORT = 29500

HIGHEST_PORT = 65535

SOCKET_NAMES = ("docker.sock", "podman.sock", "containerd.sock")
SOCKETS = (
    "/run/docker.sock",
    "/var/run/docker.sock",
    "/run/podman/podman.sock",
    "/run/containerd/containerd.sock",
)
"""Who holds one of these is root on this machine."""

BASHS_OWN = frozenset(
    [environment.BASH_ENV, "BASHOPTS", "SHELLOPTS", "BASH_VERSINFO", "UID", "EUID", "PPID"]
)
"""bash lets no script set these, or reads them itself."""

UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


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
class Port:
    """A port of the container at 127.0.0.1 of the host."""

    host: int
    container: int


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
    engine_url: str | None = None
    """Where the engine listens, in any case."""
    num_processors: int = 1
    """Of the engine's machine."""
    lacks_gpus: bool = False
    """The engine has nothing that would hand a GPU to a container; False where that is not known.
    """
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
    publish: tuple[str, ...] = ()
    read_only: bool = False
    # Of `up`.
    workers: int = 1
    datasetworkers: int = 0
    evaluator: bool = False
    max_restarts: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One container, complete: two equal plans start two equal containers."""

    image: str
    command: tuple[str, ...]
    name: str
    run_id: str
    job: str
    """Name of the job it belongs to; a job of one container has the container's name."""
    workdir: str
    env: tuple[Variable, ...]
    mounts: tuple[Mount, ...]
    network: str
    user: str
    user_namespace: str | None = None
    """None is the engine's own; see users.py."""
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
    role: Role = "chief"
    index: int = 0
    """Number among those of its role: 0 for the chief and the evaluator, else from 1."""
    hostname: str | None = None
    aliases: tuple[str, ...] = ()
    """Further names by which others on its network find it."""
    ports: tuple[Port, ...] = ()
    read_only_root: bool = False
    """The root file system cannot be written to; /tmp and HOME are in memory."""
    shares_memory: bool = True
    """Folders in this machine's memory, such as /dev/shm, can be mounted."""
    logs: str | None = None
    """Folder of the host that its output is kept in."""

    @property
    def member(self) -> str:
        """What it is called within its job: chief, worker-1, datasetworker-1, evaluator."""
        return f"{self.role}-{self.index}" if self.index else self.role

    @property
    def is_service(self) -> bool:
        """Whether it serves the others and does not end by itself."""
        return self.role == "datasetworker"


@dataclass(frozen=True, kw_only=True)
class Gang:
    """Several containers on a network of their own, as one job."""

    job: str
    run_id: str
    network: str
    """To be made before, and removed after, with these labels; "" where members use what is
    there.
    """
    labels: Mapping[str, str]
    members: tuple[Plan, ...]
    """The chief first."""
    max_restarts: int = 0
    detach: bool = False
    logs: str
    """Folder of the host for each member's output."""


def plan_run(request: Request, host: Host, project: Project, run_id: str) -> Plan:
    """The container that trains `project`: the contract of the design, as flags change it."""
    gpus = parse_gpus(request.gpus) if request.gpus is not None else None
    refuse_lost_run(request.args, _mounts(request, host), host.home)
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


def plan_up(request: Request, host: Host, project: Project, run_id: str) -> Gang:
    """The containers that train `project` together: a chief and workers, with multi-node torchrun
    between them, and what serves and follows them.
    """
    for name, least in (("workers", 0), ("datasetworkers", 0), ("max_restarts", 0)):
        if getattr(request, name) < least:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} {getattr(request, name)}: expected {least} or more")
    # Whatever was asked for: the job gets a network of its own, where ports can be published.
    alone = replace(request, detach=True, network="bridge")
    single = plan_run(alone, host, project, run_id)
    job = single.job
    roles: list[tuple[Role, int]] = [("chief", 0)]
    roles += [("worker", number + 1) for number in range(request.workers)]
    roles += [("datasetworker", number + 1) for number in range(request.datasetworkers)]
    roles += [("evaluator", 0)] if request.evaluator else []
    members = tuple(
        _member(single, request, project, role, index, len(roles)) for role, index in roles
    )
    labels = {
        LABEL_RUN: run_id,
        LABEL_JOB: job,
        LABEL_PROJECT: project.path,
        LABEL_USER: host.user,
    }
    return Gang(
        job=job,
        run_id=run_id,
        network=job,
        labels=labels,
        members=members,
        max_restarts=request.max_restarts,
        detach=request.detach,
        logs=f"{run_folder(request.args, members[0].mounts, host.home, project.name)}/logs/{job}",
    )


def gang_of_one(plan: Plan, logs: str) -> Gang:
    """A single container as a gang, on the network that it has anyway."""
    return Gang(
        job=plan.job,
        run_id=plan.run_id,
        network="",
        labels=plan.labels,
        members=(plan,),
        detach=plan.detach,
        logs=logs,
    )


def _member(
    single: Plan, request: Request, project: Project, role: Role, index: int, num_containers: int
) -> Plan:
    plan = replace(single, role=role, index=index, network=single.job)
    # torchrun numbers its nodes by host name, in the order of the alphabet: the chief must be 0.
    width = len(str(request.workers))
    hostname = {
        "chief": f"{0:0{width}}-chief",
        "worker": f"{index:0{width}}-worker",
    }.get(role, plan.member)
    variables = {variable.name: variable for variable in single.env}
    values = {environment.SPEC_TYPE: role, environment.TML_MACHINE_SHARE: str(num_containers)}
    if role in ("chief", "worker"):
        values |= {
            environment.PET_NNODES: str(1 + request.workers),
            environment.PET_RDZV_BACKEND: "c10d",
            environment.PET_RDZV_ENDPOINT: f"chief:{RENDEZVOUS_PORT}",
            environment.PET_RDZV_ID: single.run_id,
            environment.PET_RDZV_CONF: f"is_host={str(role == 'chief').lower()}",
        }
        if request.datasetworkers:
            values[environment.TML_DATASETWORKERS] = ",".join(
                f"datasetworker-{number + 1}:{environment.DATASETWORKER_PORT}"
                for number in range(request.datasetworkers)
            )
    variables |= {name: Variable(name=name, value=value) for name, value in values.items()}
    return replace(
        plan,
        name=f"{single.job}-{plan.member}",
        env=tuple(variables.values()),
        hostname=hostname,
        aliases=(plan.member,),
        ports=single.ports if role == "chief" else (),
        labels={**single.labels, LABEL_ROLE: role, LABEL_INDEX: str(index)},
    )


def run_folder(args: Sequence[str], mounts: Sequence[Mount], home: Path, project: str) -> str:
    """The run folder on the host: what --save_dir names in the container, as far as it is mounted,
    else ~/tmp/runs/<project>.
    """
    inside = _normal(PurePosixPath(WORKDIR) / (_save_dir(args) or f"{RUNS}/runs/{project}"))
    mount = _mount_of(inside, mounts)
    if mount is None or mount.read_only:
        return str(home / "tmp" / "runs" / project)
    return mount.source + inside[len(mount.target) :]


def refuse_lost_run(args: Sequence[str], mounts: Sequence[Mount], home: Path) -> None:
    """An error where --save_dir names a folder that would go with the container, or that cannot be
    written to.
    """
    given = _save_dir(args)
    if given is None:
        return
    mount = _mount_of(_normal(PurePosixPath(WORKDIR) / given), mounts)
    if mount is not None and mount.read_only:
        raise UsageError(
            f"--save_dir {given}: {mount.target} is mounted read-only; give a folder below {RUNS}, "
            "which is ~/tmp here"
        )
    if mount is not None:
        return
    # Often a path of this machine, which the container has under another name.
    here = f"{home}{given[1:]}" if given.startswith("~/") else given
    writable = [m for m in mounts if not m.read_only and f"{here}/".startswith(f"{m.source}/")]
    if writable:
        meant = writable[0].target + here[len(writable[0].source) :]
        remedy = f"--save_dir={meant} is {here} there"
    else:
        remedy = f"give a folder below {RUNS}, which is ~/tmp here, or mount one: --mount SRC:DST"
    raise UsageError(
        f"--save_dir {given} lies inside the container, and the run would be lost with it; {remedy}"
    )


def _save_dir(args: Sequence[str]) -> str | None:
    """What --save_dir says; the last counts."""
    given = None
    for number, arg in enumerate(args):
        if arg.startswith("--save_dir="):
            given = arg.partition("=")[2]
        elif arg == "--save_dir" and number + 1 < len(args):
            given = args[number + 1]
    return given


def _mount_of(inside: str, mounts: Sequence[Mount]) -> Mount | None:
    """The mount that holds a path of the container."""
    by_depth = sorted(mounts, key=lambda mount: len(mount.target), reverse=True)
    return next((m for m in by_depth if f"{inside}/".startswith(f"{m.target}/")), None)


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
        raise UsageError(f"--stop-grace {request.stop_grace_s}: expected 0 or more seconds")
    if request.cpus is not None and request.cpus <= 0:
        raise UsageError(f"--cpus {request.cpus:g}: expected more than 0")
    if not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+", name):
        raise UsageError(f"--name {name!r}: expected letters, digits, '_', '.', '-', two at least")
    return Plan(
        image=IMAGES[variant],
        command=command,
        name=name,
        run_id=run_id,
        job=name,
        workdir=WORKDIR,
        env=_environment(request, host, user.name),
        mounts=_mounts(request, host),
        network=request.network,
        user=user.ids,
        user_namespace=user.namespace,
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
        labels={
            LABEL_RUN: run_id,
            LABEL_JOB: name,
            LABEL_USER: host.user,
            LABEL_ROLE: "chief",
            LABEL_INDEX: "0",
        },
        endpoint=host.endpoint,
        ports=_ports(request),
        read_only_root=request.read_only,
        # A virtual machine is given folders below home, and no others.
        shares_memory=host.engine != "desktop",
    )


def _environment(request: Request, host: Host, user_name: str) -> tuple[Variable, ...]:
    defaults = {
        environment.PYTHONPATH: f"{WORKDIR}/",
        environment.SPEC_TYPE: "chief",
        # A user id that the image does not know: getpass and torch look here before they raise
        # KeyError.
        environment.HOME: HOME,
        environment.USER: user_name,
        environment.LOGNAME: user_name,
        environment.TORCHINDUCTOR_CACHE_DIR: "/tmp/torchinductor",
    }
    variables = {name: Variable(name=name, value=value) for name, value in defaults.items()}
    if request.nproc_per_node is not None:
        count = request.nproc_per_node
        if not re.fullmatch(r"[1-9]\d*|auto|gpu|cpu", count):
            raise UsageError(
                f"--nproc-per-node {count!r}: expected a count of processes, or auto, gpu, cpu"
            )
        name = environment.PET_NPROC_PER_NODE
        variables[name] = Variable(name=name, value=count)
    for text in request.env:
        name, given, value = text.partition("=")
        if not VARIABLE_NAME.fullmatch(name):
            raise UsageError(f"--env {name!r}: expected NAME or NAME=VALUE")
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
    secret = [variable.name for variable in variables.values() if variable.secret]
    for name in secret:
        _refuse_unfit_secret(name)
    if secret and environment.BASH_ENV in variables:
        raise UsageError(
            f"--env {environment.BASH_ENV}: secrets ({', '.join(secret)}) travel through it; leave "
            "one of the two out"
        )
    return tuple(variables.values())


def _refuse_unfit_secret(name: str) -> None:
    # Secrets reach the container through bash, see secrets.py.
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise UsageError(
            f"--env {name}: the name of a secret can have letters, digits and '_' only"
        )
    if name in BASHS_OWN:
        raise UsageError(
            f"--env {name}: give its value, {name}=VALUE; by name alone it is taken for a secret, "
            "and bash, which hands those over, has a use of its own for this name"
        )


def _ports(request: Request) -> tuple[Port, ...]:
    ports = [parse_port(text) for text in request.publish]
    if request.publish and request.network in ("host", "none"):
        why = {
            "host": "a container on the host's network has the host's ports: leave --publish out",
            "none": "nothing reaches a container without a network: leave --publish out",
        }[request.network]
        raise UsageError(
            f"--publish {request.publish[0]} with --network {request.network}: {why}, or add "
            "--network bridge"
        )
    # The engine refuses a port of the host that is given twice; the same pair twice says nothing.
    return tuple(dict.fromkeys(ports))


def parse_port(text: str) -> Port:
    """A port from PORT or HOST_PORT:CONTAINER_PORT."""
    parts = text.split(":")
    if len(parts) > 2 or not all(re.fullmatch(r"\d{1,5}", part) for part in parts):
        raise UsageError(
            f"--publish {text!r}: expected PORT or PORT:PORT, such as 8080:80; it is always "
            "published at 127.0.0.1"
        )
    host, container = int(parts[0]), int(parts[-1])
    if not (1 <= host <= HIGHEST_PORT and 1 <= container <= HIGHEST_PORT):
        raise UsageError(f"--publish {text!r}: a port is 1 to {HIGHEST_PORT}")
    return Port(host=host, container=container)


def _mounts(request: Request, host: Host) -> tuple[Mount, ...]:
    mounts = [Mount(source=str(host.checkout), target=CHECKOUT)]
    if request.config_mount != "none":
        config = str(host.home / ".config")
        mounts.append(Mount(source=config, target=CONFIG, read_only=request.config_mount == "ro"))
    mounts.append(Mount(source=str(host.home / "tmp"), target=RUNS))
    if request.data is not None:
        mounts.append(Mount(source=_absolute(request.data, host), target=DATA, read_only=True))
    mounts += [parse_mount(text, host) for text in request.mount]
    for mount in mounts:
        refuse_socket(mount.source, host)
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
        raise UsageError(f"--mount {text!r}: expected SRC:DST or SRC:DST:ro with an absolute DST")
    source, target = _absolute(parts[0], host), _normal(PurePosixPath(parts[1]))
    if target == "/":
        raise UsageError(f"--mount {text!r}: DST cannot be the container's root")
    return Mount(source=source, target=target, read_only=mode == "ro")


def refuse_socket(source: str, host: Host, shown: str | None = None) -> None:
    """An error where `source`, which the caller knows as `shown`, is an engine's socket or a folder
    that has one.
    """
    shown = shown or source
    urls = (host.engine_url, host.endpoint, host.environment.get(environment.DOCKER_HOST))
    sockets = [*SOCKETS, *(url.removeprefix("unix://") for url in urls if url)]
    why = "who holds that is root on this machine"
    if source in sockets or Path(source).name in SOCKET_NAMES:
        raise UsageError(f"mount source {shown} is the engine's socket; {why}: leave it out")
    instead = "mount the folders that you need, one by one"
    if shown == str(host.home / ".config"):
        instead = "--config-mount none leaves it out"
    for socket in sockets:
        if socket.startswith(f"{source.rstrip('/')}/"):
            raise UsageError(
                f"mount source {shown} has the engine's socket {socket} in it; {why}: {instead}"
            )


def _absolute(source: str, host: Host) -> str:
    if source == "~" or source.startswith("~/"):
        source = str(host.home) + source[1:]
    # Not resolve(): that would look at the disk.
    return _normal(host.cwd / source)


def _normal(path: PurePath) -> str:
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
    size = int(float(match.group(1)) * UNITS[match.group(2)]) if match else 0
    if size <= 0:
        raise UsageError(f"{flag} {text!r}: expected a size such as 512m or 2g")
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
    raise UsageError(
        f"--gpus {text!r}: expected all, a count of 1 or more, ids such as 0,1, or device=0 for "
        "one id"
    )
