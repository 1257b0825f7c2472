"""The environment variables that tml reads and writes: the only file that knows their names.

Standard library only: the launcher, the scripts' guards and the trainer all read it. torchrun sets
the rank and the addresses; `python -m tml.docker` sets the role; a script that is started without
either gets the defaults below.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

Role = Literal["chief", "worker", "datasetworker", "evaluator"]
ROLES: tuple[Role, ...] = get_args(Role)

SPEC_TYPE = "SPEC_TYPE"
"""The role of this container or process, one of ROLES."""
TML_BASE = "TML_BASE"
"""Root of the checkout, where it is not the folder that holds this package."""
TML_LAUNCHER = "TML_LAUNCHER"
"""How to call the launcher in messages, when it was started through a script."""
TML_FAULT_REPEATS = "TML_FAULT_REPEATS"
"""How often tests/integration/test_docker_faults.py repeats each fault; 1 where unset."""
TML_REQUIRE_DOCKER = "TML_REQUIRE_DOCKER"
"""1: a missing engine fails the tests that need one, instead of leaving them out."""
PET_NPROC_PER_NODE, PET_NNODES = "PET_NPROC_PER_NODE", "PET_NNODES"
PET_RDZV_BACKEND, PET_RDZV_ENDPOINT = "PET_RDZV_BACKEND", "PET_RDZV_ENDPOINT"
PET_RDZV_ID, PET_RDZV_CONF = "PET_RDZV_ID", "PET_RDZV_CONF"
"""torchrun's own names for its flags: --nproc_per_node, …"""
TML_MACHINE_SHARE = "TML_MACHINE_SHARE"
"""Containers of this job that share the processors of one machine; 1 where unset."""
TML_WORKERS = "TML_WORKERS"
"""Under Compose: the number of worker containers that there should be."""
TML_USER, TML_USER_NAME, TML_HOME = "TML_USER", "TML_USER_NAME", "TML_HOME"
TML_SCRIPT, TML_ARGS, TML_DATA = "TML_SCRIPT", "TML_ARGS", "TML_DATA"
TML_NPROC_PER_NODE, TML_IMAGE_INPUTS = "TML_NPROC_PER_NODE", "TML_IMAGE_INPUTS"
TML_SHM_SIZE, TML_MEMORY, TML_CPUS = "TML_SHM_SIZE", "TML_MEMORY", "TML_CPUS"
COMPOSE_PROFILES = "COMPOSE_PROFILES"
"""What docker-compose.yml is filled from."""
TML_DATASETWORKERS = "TML_DATASETWORKERS"
"""Addresses host:port of the data set workers, with commas between; unset: data are read here."""
TML_DATASETWORKER_PORT = "TML_DATASETWORKER_PORT"
"""Port that a data set worker serves on; DATASETWORKER_PORT where unset, 0 takes a free one."""
DATASETWORKER_PORT = 50051
OMP_NUM_THREADS, OMP_WAIT_POLICY = "OMP_NUM_THREADS", "OMP_WAIT_POLICY"
GOMP_SPINCOUNT = "GOMP_SPINCOUNT"
"""How often a thread that waits for others looks before it sleeps."""
TORCH_ELASTIC_SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
TORCH_CPP_LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"
RANK, LOCAL_RANK = "RANK", "LOCAL_RANK"
WORLD_SIZE, LOCAL_WORLD_SIZE = "WORLD_SIZE", "LOCAL_WORLD_SIZE"
MASTER_ADDR, MASTER_PORT = "MASTER_ADDR", "MASTER_PORT"
TML_SAID = "TML_SAID"
"""Folder of a torchrun in which its processes note which errors were said: what is wrong for all of
them is said once."""
TML_EXEC = "TML_EXEC"
"""Marks the processes of one `exec` inside a container, so that they can be found and ended."""
BASH_ENV = "BASH_ENV"
"""A file that bash reads before a script: how secrets reach a container."""
PYTHONPATH, HOME, USER, LOGNAME = "PYTHONPATH", "HOME", "USER", "LOGNAME"
TORCHINDUCTOR_CACHE_DIR = "TORCHINDUCTOR_CACHE_DIR"
DOCKER_HOST, DOCKER_CONTEXT, DOCKER_CONFIG = "DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_CONFIG"
DOCKER_TLS_VERIFY = "DOCKER_TLS_VERIFY"
ARGCOMPLETE = "_ARGCOMPLETE"
"""Set where a shell asks for completions instead of a verb."""
XDG_RUNTIME_DIR, XDG_STATE_HOME = "XDG_RUNTIME_DIR", "XDG_STATE_HOME"
XDG_CACHE_HOME = "XDG_CACHE_HOME"
TML_NATIVE = "TML_NATIVE"
"""0: torch does what compiled kernels (tml/native) would do."""
NO_COLOR = "NO_COLOR"
"""Anything: no colours, as many programs have it."""
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY")
"""Taken over into image builds, in capitals or small; the engine keeps these out of an image's
history.
"""

_SECRET_WORDS = frozenset(
    ["TOKEN", "KEY", "APIKEY", "SECRET", "SECRETS", "PASSWORD", "PASSWD", "PASS", "PASSPHRASE"]
    + ["PWD", "CREDENTIAL", "CREDENTIALS", "AUTH"]
)


def get(name: str) -> str | None:
    """The value of a variable that somebody else named, as in `${NAME}` of a YAML file; None where
    unset.
    """
    return os.environ.get(name)


def _integer(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise ValueError(f"{name}={text!r} in the environment: expected an integer of 0 or more")
    return value


def rank() -> int:
    """Rank among all processes of the job; 0 outside torchrun."""
    return _integer(RANK, 0)


def local_rank() -> int:
    """Rank among the processes of this machine or container; 0 outside torchrun."""
    return _integer(LOCAL_RANK, 0)


def world_size() -> int:
    """Number of processes of the job; 1 outside torchrun."""
    return _integer(WORLD_SIZE, 1)


def local_world_size() -> int:
    """Number of processes on this machine or container; 1 outside torchrun."""
    return _integer(LOCAL_WORLD_SIZE, 1)


def machine_share() -> int:
    """Containers of this job that share the processors of this machine; 1 where nothing says."""
    return max(1, _integer(TML_MACHINE_SHARE, 1 + (compose_workers() or 0)))


def compose_workers() -> int | None:
    """Under Compose: the number of worker containers that there should be."""
    return _integer(TML_WORKERS, 0) if os.environ.get(TML_WORKERS) else None


def datasetworkers() -> tuple[str, ...]:
    """Addresses of the data set workers, as host:port; none where data are read here."""
    text = os.environ.get(TML_DATASETWORKERS, "")
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    for address in found:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
            raise ValueError(
                f"{TML_DATASETWORKERS}={text!r} in the environment: {address!r} is no host:port"
            )
    return found


def datasetworker_port() -> int:
    """Port that a data set worker serves on."""
    return _integer(TML_DATASETWORKER_PORT, DATASETWORKER_PORT)


def set_default(name: str, value: str) -> None:
    """Set a variable for this process and those it starts, where it has no value yet."""
    if not os.environ.get(name):
        os.environ[name] = value


@contextmanager
def setting(name: str, value: str) -> Iterator[None]:
    """Set a variable for this process and those that it starts within."""
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


def has_master_address() -> bool:
    """Whether torchrun (or someone like it) said where the processes meet."""
    return bool(os.environ.get(MASTER_ADDR)) and bool(os.environ.get(MASTER_PORT))


def spec_type() -> Role:
    """This container's role; chief where nothing says otherwise."""
    text = os.environ.get(SPEC_TYPE) or "chief"
    for role in ROLES:
        if role == text:
            return role
    raise ValueError(f"{SPEC_TYPE}={text!r} in the environment: expected one of {', '.join(ROLES)}")


def tml_base() -> Path:
    """Root of the checkout: TML_BASE where set, else the folder that holds this package."""
    given = os.environ.get(TML_BASE)
    return Path(given).resolve() if given else Path(__file__).resolve().parents[2]


def home(env: Mapping[str, str] = os.environ) -> Path:
    """The caller's home folder."""
    given = env.get(HOME)
    if given:
        return Path(given)
    try:
        return Path.home()
    except RuntimeError:
        raise ValueError(
            "HOME is not set and this user has no entry in the user database: export HOME"
        ) from None


def cache_home() -> Path:
    """The caller's folder of what can be made again."""
    given = os.environ.get(XDG_CACHE_HOME)
    return Path(given) if given else home() / ".cache"


def wants_native() -> bool:
    """Whether compiled kernels may be used: unless the variable is 0."""
    return os.environ.get(TML_NATIVE) != "0"


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name likely holds something that must not be printed.

    By whole words (HF_TOKEN, apiKey, DB_PASSWORD) so that MONKEY and TOKENIZERS_PARALLELISM are not
    taken for one.
    """
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return any(word.upper() in _SECRET_WORDS for word in words)
