"""Finding the Docker Engine: the environment, the context, the usual sockets, and an error that
says which of them failed how.
"""

import errno
import gc
import json
import os
import shutil
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tml.docker.errors import LauncherError, NoEngineError
from tml.docker.users import EngineInfo
from tml.machines import environment

if TYPE_CHECKING:
    from docker import APIClient

DEFAULT_SOCKET = "unix:///var/run/docker.sock"


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where an engine listens, and who said so."""

    url: str
    origin: str
    context: str | None = None
    usual: bool = True
    """`docker` without -H looks there too."""


def connect() -> tuple["APIClient", Endpoint]:
    """A client of the engine that the environment, the context or the usual sockets name."""
    endpoint = find_endpoint()
    docker = _import_docker()
    try:
        if endpoint.context is not None:
            client = docker.DockerClient.from_context(endpoint.context).api
        elif endpoint.origin == environment.DOCKER_HOST:
            client = docker.from_env(use_context=False).api
        else:
            client = docker.APIClient(base_url=endpoint.url, version="auto")
    except (docker.errors.DockerException, OSError) as error:
        raise NoEngineError(
            _no_engine([f"{endpoint.url} (from {endpoint.origin}): {error}"])
        ) from error
    return client, endpoint


def find_endpoint(env: Mapping[str, str] = os.environ) -> Endpoint:
    """Where the engine is; an error where none listens, where we may not speak to it, or there is
    no such context.
    """
    candidates = _candidates(env)
    refusals = []
    for endpoint in candidates:
        refusal = _try_socket(endpoint.url)
        if refusal is None:
            return endpoint
        if refusal == errno.EACCES:
            raise NoEngineError(_no_permission(endpoint))
        refusals.append(f"{endpoint.url} (from {endpoint.origin}): {os.strerror(refusal).lower()}")
    raise NoEngineError(_no_engine(refusals))


def _candidates(env: Mapping[str, str]) -> list[Endpoint]:
    if env.get(environment.DOCKER_HOST):
        return [Endpoint(url=env[environment.DOCKER_HOST], origin=environment.DOCKER_HOST)]
    name, origin = _current_context(env)
    if name != "default":
        contexts = _read_contexts(env)
        if name not in contexts:
            # docker-py would silently take the default engine.
            there = ", ".join(["default", *sorted(contexts)])
            raise NoEngineError(
                f"there is no Docker context {name!r} (from {origin}); there are: {there}"
            )
        return [Endpoint(url=contexts[name], origin=f"context {name}", context=name)]
    others = [environment.home(env) / ".docker/run/docker.sock"]
    if env.get(environment.XDG_RUNTIME_DIR):
        others.insert(0, Path(env[environment.XDG_RUNTIME_DIR]) / "docker.sock")
    usual = Endpoint(url=DEFAULT_SOCKET, origin="the default")
    return [
        usual,
        *(Endpoint(url=f"unix://{path}", origin="a usual place", usual=False) for path in others),
    ]


def _config_folder(env: Mapping[str, str]) -> Path:
    return Path(env.get(environment.DOCKER_CONFIG) or environment.home(env) / ".docker")


def _current_context(env: Mapping[str, str]) -> tuple[str, str]:
    if env.get(environment.DOCKER_CONTEXT):
        return env[environment.DOCKER_CONTEXT], environment.DOCKER_CONTEXT
    file = _config_folder(env) / "config.json"
    try:
        name = json.loads(file.read_text()).get("currentContext") or "default"
    except (OSError, ValueError, AttributeError):
        name = "default"
    return str(name), str(file)


def _read_contexts(env: Mapping[str, str]) -> dict[str, str]:
    contexts = {}
    for file in (_config_folder(env) / "contexts/meta").glob("*/meta.json"):
        try:
            data = json.loads(file.read_text())
            contexts[str(data["Name"])] = str(data["Endpoints"]["docker"]["Host"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return contexts


def _try_socket(url: str) -> int | None:
    """The error number with which a Unix socket refuses us; None where it takes us, or is no Unix
    socket.
    """
    if not url.startswith("unix://"):
        return None
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(url.removeprefix("unix://"))
        except OSError as error:
            return error.errno or errno.EIO
    return None


def _no_engine(refusals: list[str]) -> str:
    tried = "".join(f"\n    {refusal}" for refusal in refusals)
    return (
        f"no Docker Engine answers. Tried:{tried}\n"
        "  Start it (sudo systemctl start docker; on a desktop, Docker Desktop), or say where it\n"
        "  is: DOCKER_HOST or DOCKER_CONTEXT.\n"
        "  The same job without an engine, in a virtual environment:\n"
        "    ./scripts/run.sh --venv"
    )


def _no_permission(endpoint: Endpoint) -> str:
    path = endpoint.url.removeprefix("unix://")
    return (
        f"an engine listens at {path}, but user id {os.getuid()} may not speak to it "
        "(permission denied).\n"
        "  Join its group (sudo usermod -aG docker $USER, then log in again), or use a rootless\n"
        "  engine.\n"
        "  The same job without an engine, in a virtual environment:\n"
        "    ./scripts/run.sh --venv"
    )


def _import_docker() -> Any:
    how = (
        "install what the launcher needs with ./scripts/setup_venv.sh launcher, and call it as "
        ".venv/bin/python -m tml.docker"
    )
    # Its 500 modules make no garbage worth collecting: a seventh of the time they take to load.
    gc.disable()
    try:
        import docker
        import docker.errors
    except ImportError as error:
        raise LauncherError(
            f"the Python package docker is not installed in {sys.prefix}; {how}"
        ) from error
    finally:
        gc.enable()
    version = tuple(int(part) for part in docker.__version__.split(".")[:2])
    if version < (7, 2):
        # Older ones ignore contexts, and would speak to another engine than `docker` does.
        raise LauncherError(f"docker-py {docker.__version__} is too old, 7.2 is needed; {how}")
    return docker


def describe(client: "APIClient", endpoint: Endpoint) -> EngineInfo:
    """What the engine says of itself."""
    info, version = client.info(), client.version()
    us = os.uname()
    return EngineInfo(
        url=endpoint.url,
        here=(info.get("Name"), info.get("KernelVersion")) == (us.nodename, us.release),
        operating_system=info.get("OperatingSystem") or "",
        platform=(version.get("Platform") or {}).get("Name") or "",
        components=tuple(part["Name"] for part in version.get("Components") or []),
        security_options=tuple(info.get("SecurityOptions") or []),
        num_processors=info.get("NCPU") or 1,
        gpu_runtime=gpu_runtime(info),
    )


def gpu_runtime(info: Mapping[str, Any]) -> str | None:
    """By what this engine would pass GPUs on."""
    if "nvidia" in (info.get("Runtimes") or {}):
        return "the runtime nvidia"
    devices = info.get("DiscoveredDevices") or []
    if any("nvidia.com/gpu" in str(device.get("ID", "")) for device in devices):
        return "CDI"
    # An engine that finds this takes it, whatever runtimes it has been told of.
    return "the NVIDIA hook" if shutil.which("nvidia-container-runtime-hook") else None
