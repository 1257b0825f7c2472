"""What doctor judges: pure functions from facts about the machine to `Check`s. doctor.py gathers
the facts and prints.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

from tml.docker.errors import LauncherError
from tml.docker.hints import in_bytes
from tml.docker.plan import BUILDS, IMAGES, SHM_BYTES, Variant
from tml.docker.users import EngineKind, container_user

Level = Literal["ok", "warning", "error"]

API_NEEDED = (1, 40)
"""Docker Engine 19.03: the first that takes requests for GPUs."""
COMPOSE_NEEDED, COMPOSE_ABORTS = (2, 0), (2, 27)
"""The first that reads docker-compose.yml; the first with --abort-on-container-failure."""
DOCKER_PY_NEEDED = (7, 2)
PYTHON_NEEDED = (3, 11)

LOADERS, PREFETCHED, BATCH_WANTED = 4, 2, 16 << 20
"""What /dev/shm is held against: data loader processes for each training process, batches that each
of them keeps ready (PyTorch's default), and a batch that is large for tables of ids.
"""
TENSORBOARD_PORT, TORCHRUN_PORT = 6006, 29500

MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of doctor's."""

    name: str
    level: Level
    text: str
    remedy: str = ""
    """What to do; none where all is well."""


def ok(name: str, text: str) -> Check:
    """All is well."""
    return Check(name=name, level="ok", text=text)


def warning(name: str, text: str, remedy: str) -> Check:
    """Something does not work, or not well, that not everybody needs."""
    return Check(name=name, level="warning", text=text, remedy=remedy)


def error(name: str, text: str, remedy: str) -> Check:
    """Training in containers will not work."""
    return Check(name=name, level="error", text=text, remedy=remedy)


def version_of(text: str) -> tuple[int, ...]:
    """2, 26 from 2.26.1-4, v2.26.1 or 2.26.1+dfsg1."""
    parts = text.strip().removeprefix("v").split(".")[:2]
    return tuple(int(part) for part in parts if part.isdigit())


# The engine


def no_engine(message: str) -> Check:
    """No engine: which of the failures it is, the message says. Its first line and what was tried,
    which stands further in, are what was found; the rest is what to do.
    """
    first, *rest = message.splitlines()
    tried = list(takewhile(lambda line: line.startswith("    "), rest))
    remedy = " ".join(line.strip() for line in rest[len(tried) :])
    return error("engine", " ".join([first, *(line.strip() for line in tried)]), remedy)


def engine(version: str, url: str, origin: str, context: str | None) -> Check:
    """The engine that answers, and who said where it is."""
    said = f"context {context}" if context else origin
    return ok("engine", f"{version} at {url} (from {said})")


def api(version: str) -> Check:
    """The version of the engine's API."""
    needed = ".".join(map(str, API_NEEDED))
    if version_of(version) < API_NEEDED:
        return error("API", f"{version}; {needed} is needed", "update the engine: 19.03 or later")
    return ok("API", f"{version} ({needed} is needed)")


def socket_mode(url: str, mode: int | None, tls: bool) -> Check:
    """Who else may speak to the engine: whoever may is root on its machine."""
    if url.startswith("unix://"):
        path = url.removeprefix("unix://")
        if mode is not None and mode & 0o002:
            return warning(
                "socket",
                f"{path} takes everybody on this machine, and each of them is root through it",
                f"sudo chmod 660 {path}, and sudo usermod -aG docker for those who need it",
            )
        return ok("socket", f"{path} takes this user" + (f" (mode {mode:o})" if mode else ""))
    if url.startswith("tcp://") and not tls and "//127." not in url and "//localhost" not in url:
        return warning(
            "socket",
            f"{url} is neither encrypted nor asks who we are",
            "use TLS (DOCKER_TLS_VERIFY, DOCKER_CERT_PATH) or ssh://",
        )
    return ok("socket", url)


def user(kind: EngineKind, uid: int, gid: int, name: str) -> Check:
    """Which user containers run as, and whether files will be the caller's."""
    try:
        chosen = container_user(kind, uid, gid, name)
    except LauncherError as refusal:
        first, _, rest = str(refusal).partition(". ")
        return error("user", f"{kind} engine: {first}", rest)
    inside = f" in namespace {chosen.namespace}" if chosen.namespace else ""
    return ok("user", f"{kind} engine: containers run as {chosen.ids}{inside}, files are yours")


def storage(driver: str, root: str, free: int | None) -> list[Check]:
    """The storage driver and the room where images are; free is None where it cannot be seen."""
    checks = []
    if driver in ("vfs", "aufs", "devicemapper"):
        checks.append(
            warning(
                "storage",
                f"driver {driver}: "
                + ("every layer is a whole copy" if driver == "vfs" else "no longer maintained"),
                "let the engine use overlay2 (/etc/docker/daemon.json: storage-driver)",
            )
        )
    else:
        checks.append(ok("storage", f"driver {driver}"))
    if free is not None:
        remedy = (
            "docker system prune removes what nobody uses; docker system df shows what there is"
        )
        checks.append(_room("disk, images", root, free, 10 * GIB, 2 * GIB, remedy))
    return checks


def machine(memory: int, processors: int) -> list[Check]:
    """Memory and processors of the engine's machine."""
    text = f"{processors} processors, {in_bytes(memory)} of memory"
    if memory < 4 * GIB:
        return [
            warning(
                "machine",
                f"{text}; each training process takes half a GiB before it has read anything",
                "fewer processes (--nproc-per-node 1), smaller tables; in Docker Desktop give the "
                "virtual machine more (Settings, Resources)",
            )
        ]
    if processors < 2:
        return [
            warning(
                "machine",
                f"{text}; the default run has two processes",
                "--nproc-per-node 1",
            )
        ]
    return [ok("machine", text)]


def limits(info: Mapping[str, Any]) -> Check:
    """Whether the engine can hold containers to limits."""
    flags = {
        "--memory": info.get("MemoryLimit"),
        "--cpus": info.get("CpuCfsQuota"),
        "the limit of processes": info.get("PidsLimit"),
    }
    missing = [name for name, there in flags.items() if there is False]
    if missing:
        return warning(
            "limits",
            f"this engine cannot hold to {', '.join(missing)}: the kernel or its cgroups refuse",
            "rootless: delegate cgroup v2 controllers to your user (systemd, Delegate=yes); "
            "rootful: boot with cgroup_enable=memory swapaccount=1",
        )
    return ok("limits", f"memory, processors, processes (cgroup v{info.get('CgroupVersion', '?')})")


def shared_memory(processors: int, memory: int, shm: int = SHM_BYTES) -> Check:
    """The default /dev/shm of a container against what data loaders would put there: training
    processes × LOADERS × PREFETCHED × batch. The projects here read in threads and put nothing
    there but what NCCL takes; a project with data loader processes needs this much.
    """
    processes = min(processors, 8)
    batch = shm // (processes * LOADERS * PREFETCHED)
    text = (
        f"{in_bytes(shm)} a container: {processes} process{'es' if processes > 1 else ''} × "
        f"{LOADERS} data loaders × "
        f"{PREFETCHED} batches of {in_bytes(batch)}"
    )
    if shm > memory // 2:
        return warning(
            "/dev/shm",
            f"{text}; what is put there is memory, and the machine has {in_bytes(memory)}",
            f"--shm-size {max(64, memory // 8 // MIB)}m",
        )
    if batch < BATCH_WANTED:
        wanted = processes * LOADERS * PREFETCHED * BATCH_WANTED
        return warning("/dev/shm", text, f"--shm-size {wanted // MIB}m for larger batches")
    return ok("/dev/shm", text)


# GPUs


def gpus(devices: Sequence[str], cards: int, runtime: str | None) -> Check:
    """GPUs that the driver shows, cards on the bus, and by what the engine would pass them on."""
    toolkit = (
        "install the NVIDIA Container Toolkit, then `sudo nvidia-ctk runtime configure "
        "--runtime=docker` and restart the engine"
    )
    if devices and runtime:
        return ok("GPUs", f"{len(devices)}: {', '.join(dict.fromkeys(devices))} (by {runtime})")
    if devices:
        return warning(
            "GPUs",
            f"{len(devices)} here ({', '.join(dict.fromkeys(devices))}), but the engine has no GPU "
            "runtime: --gpus will fail",
            toolkit,
        )
    if cards:
        return warning(
            "GPUs",
            f"{cards} NVIDIA card(s) here without a driver that answers: --gpus will fail",
            "install NVIDIA's driver until nvidia-smi shows the card(s); then " + toolkit,
        )
    return ok("GPUs", "none here: training takes the processors")


# The image and the jobs


def image(variant: Variant, there: str | None, wanted: str, size: int | None) -> Check:
    """Whether the image of a variant is what the checkout asks for."""
    name = IMAGES[variant]
    of = {"cpu": "run, up", "gpu": "--gpus", "dev": "test, the editor"}[variant]
    build = BUILDS[variant]
    if there is None:
        if variant == "cpu":
            return warning(
                "image", f"{name} is not there: the first run builds it, which takes minutes", build
            )
        return ok(f"image {variant}", f"{name} is not there; {of} would build it ({build})")
    label = "image" if variant == "cpu" else f"image {variant}"
    if there != wanted:
        why = "says nothing of what it was built from" if there == "" else "is stale"
        return warning(
            label,
            f"{name} {why}: the Dockerfile or requirements/ differ; the next use builds it",
            f"{build}; --no-build takes it as it is",
        )
    return ok(label, f"{name} is current" + (f", {in_bytes(size)}" if size else ""))


def jobs(running: Sequence[str], stale: Sequence[str], networks: Sequence[str]) -> list[Check]:
    """Jobs that run, and containers and networks whose launcher is dead."""
    checks = []
    if stale or networks:
        what = [f"{len(stale)} container(s)"] if stale else []
        what += [f"{len(networks)} network(s)"] if networks else []
        names = ", ".join(dict.fromkeys([*stale, *networks]))
        checks.append(
            warning(
                "stale runs",
                f"{' and '.join(what)} of launchers that are dead: {names}",
                "python -m tml.docker gc",
            )
        )
    names = ", ".join(running)
    checks.append(ok("jobs", f"{len(running)} running: {names}" if running else "none running"))
    return checks


# This machine


def _room(name: str, path: str, free: int, want: int, need: int, remedy: str) -> Check:
    text = f"{in_bytes(free)} free at {path}"
    if free < need:
        return error(name, f"{text}; {in_bytes(need)} are needed", remedy)
    if free < want:
        return warning(name, f"{text}; {in_bytes(want)} are better", remedy)
    return ok(name, text)


def run_disk(path: str, free: int, owner: int | None, writable: bool, uid: int) -> Check:
    """The folder that runs are written to."""
    if not writable:
        whose = "" if owner in (None, uid) else f": it belongs to user id {owner}"
        return error(
            "disk, runs",
            f"{path} cannot be written to{whose}",
            f"sudo chown -R $(id -u):$(id -g) {path}",
        )
    remedy = "remove old runs there, or write elsewhere (--save_dir)"
    return _room("disk, runs", path, free, 2 * GIB, 100 * MIB, remedy)


def temporary_disk(path: str, free: int) -> Check:
    """The folder for temporary files."""
    return _room("disk, /tmp", path, free, GIB, 50 * MIB, f"make room in {path}")


def port(number: int, what: str, is_free: bool) -> Check:
    """A port at 127.0.0.1 that something of ours may want."""
    if is_free:
        return ok(f"port {number}", f"free, for {what}")
    return warning(
        f"port {number}",
        f"taken: {what} cannot have it",
        f"ss -ltnp 'sport = :{number}' shows by whom",
    )


def command_line(docker: str | None) -> Check:
    """The docker command; the launcher itself speaks to the engine without it."""
    if docker is None:
        return warning(
            "docker CLI",
            "there is no command docker: lines of --dry-run and docker compose cannot be used",
            "install docker-ce-cli (Debian: docker-cli), or do without",
        )
    return ok("docker CLI", docker)


def compose(version: str | None) -> Check:
    """Docker Compose; only `docker compose up` needs it."""
    if version is None:
        return warning(
            "Compose",
            "there is no docker compose; `python -m tml.docker up` does not need it",
            "install docker-compose-plugin (Debian: docker-compose-v2)",
        )
    number = version_of(version)
    if number < COMPOSE_NEEDED:
        return warning(
            "Compose", f"{version}; 2.0 is needed for docker-compose.yml", "update docker compose"
        )
    note = ""
    if number < COMPOSE_ABORTS:
        note = "; --abort-on-container-failure came with 2.27: a failed worker stops nobody"
    return ok("Compose", version + note)


def python(
    version: tuple[int, ...], in_venv: bool, prefix: str, docker_py: str | None
) -> list[Check]:
    """This Python, and docker-py in it."""
    number = ".".join(map(str, version[:3]))
    setup = "./scripts/setup_venv.sh launcher, then .venv/bin/python -m tml.docker"
    place = "a virtual environment" if in_venv else "not a virtual environment"
    text = f"{number} at {prefix}, {place}"
    if version[:2] < PYTHON_NEEDED:
        checks = [error("Python", f"{text}; 3.11 is needed", setup)]
    else:
        checks = [ok("Python", text)]
    if docker_py is None:
        checks.append(error("docker-py", f"not installed in {prefix}", setup))
    elif version_of(docker_py) < DOCKER_PY_NEEDED:
        checks.append(
            error("docker-py", f"{docker_py}; 7.2 is needed, which honours contexts", setup)
        )
    else:
        checks.append(ok("docker-py", docker_py))
    return checks


def environments(stamps: Mapping[str, str], wanted: str, there: bool) -> Check:
    """The checkout's .venv; stamps: hash of requirements/ that each set was installed from."""
    if not there:
        return ok(".venv", "none in the checkout; ./scripts/setup_venv.sh makes one")
    stale = [name for name, stamp in stamps.items() if stamp != wanted]
    if not stamps:
        return warning(".venv", "half made: no set in it is whole", "./scripts/setup_venv.sh")
    if stale:
        kind = next((name for name in stale if name in ("cpu", "gpu")), "")
        sets = f"{kind or 'cpu'} dev" if "dev" in stale else kind or "launcher"
        return warning(
            ".venv",
            f"{', '.join(stale)} stale: requirements/ changed since it was made",
            f"./scripts/setup_venv.sh {sets}",
        )
    return ok(".venv", f"{', '.join(stamps)} current")


def compose_file(values: Mapping[str, str] | None, wanted: Mapping[str, str]) -> Check:
    """.env, which docker-compose.yml is filled from, against what compose-env would write now."""
    if values is None:
        return ok(".env", "none; docker-compose.yml has defaults")
    differing = [name for name, value in wanted.items() if values.get(name, value) != value]
    if differing:
        told = "; ".join(f"{name} is {values[name]}, not {wanted[name]}" for name in differing)
        return warning(".env", f"stale: {told}", "python -m tml.docker compose-env")
    return ok(".env", "current")


def pip(settings: Mapping[str, str], missing: Sequence[str]) -> Check:
    """pip's settings that a build of the image takes over; addresses without passwords."""
    if missing:
        return warning(
            "pip",
            f"its settings name what is not there: {', '.join(missing)}",
            "mend it: `pip config list` and the variables PIP_… say where it is set",
        )
    told = ", ".join(f"{name} {value}" for name, value in settings.items())
    return ok(
        "pip", f"a build takes over {told}" if told else "its defaults; a build needs no more"
    )
