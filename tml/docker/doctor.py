"""`doctor`: looks at engine, image, machine and jobs, and says what is wrong and what to do.

Facts are gathered at once, in threads, since some take a subprocess or the engine; nothing is
changed and nothing is asked of a network. Without an engine its own checks fall away but for the
one that says so.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tml.docker import checks, image, owner
from tml.docker.checks import Check
from tml.docker.errors import LauncherError
from tml.docker.plan import IMAGES, LABEL_JOB, LABEL_OWNER
from tml.machines import environment
from tml.machines.is_venv import is_venv

if TYPE_CHECKING:
    from docker import APIClient

    from tml.docker.connection import Endpoint

ENGINE_TIMEOUT_S = 8.0
"""An engine that takes longer to say what it is will not do."""
COMMAND_TIMEOUT_S = 4.0

MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "error": ("✗", "red")}

Result = TypeVar("Result")


def main(flags: argparse.Namespace, args: Sequence[str]) -> int:
    """Look, and say; 1 where something is an error."""
    found = examine(environment.tml_base())
    errors = sum(check.level == "error" for check in found)
    warnings = sum(check.level == "warning" for check in found)
    if flags.json:
        told = [asdict(check) for check in found]
        print(json.dumps({"checks": told, "errors": errors, "warnings": warnings}, indent=2))
    else:
        _show(found, f"{_count(errors, 'error')}, {_count(warnings, 'warning')}")
    return 1 if errors else 0


def examine(checkout: Path) -> list[Check]:
    """All checks, in the order in which they are told."""
    engine = _Later(lambda: _engine(checkout))
    docker = _Later(lambda: _first_line("docker", "--version"))
    compose = _Later(lambda: _first_line("docker", "compose", "version", "--short"))
    nvidia = _Later(_nvidia_devices)
    pip = _Later(_pip)
    here = [
        *_python(),
        checks.environments(*_environments(checkout)),
        _run_disk(),
        checks.temporary_disk("/tmp", shutil.disk_usage("/tmp").free),
        *(
            checks.port(number, what, _is_free(number))
            for number, what in (
                (checks.TENSORBOARD_PORT, "TensorBoard of docker compose"),
                (checks.TORCHRUN_PORT, "multi-node torchrun on the host's network"),
            )
        ),
        _compose_file(checkout),
    ]
    told = _engine_checks(engine, nvidia)
    told += [checks.command_line(docker.get(COMMAND_TIMEOUT_S))]
    told += [checks.compose(compose.get(COMMAND_TIMEOUT_S))]
    return [*told, *here, *([found] if (found := pip.get(COMMAND_TIMEOUT_S)) else [])]


class _Later(Generic[Result]):
    """A call in a thread of its own, which nobody waits for longer than they said."""

    def __init__(self, call: Callable[[], Result]) -> None:
        self._call = call
        self._result: Result | None = None
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._call()
        except Exception as error:
            self.error = error

    def get(self, timeout_s: float) -> Result | None:
        """Its result; None where it failed or is not there in time."""
        self._thread.join(timeout_s)
        return self._result

    @property
    def is_late(self) -> bool:
        """It has not come back."""
        return self._thread.is_alive()


# The engine


def _engine_checks(engine: _Later[list[Check]], nvidia: _Later[list[str]]) -> list[Check]:
    told = engine.get(ENGINE_TIMEOUT_S)
    if told is not None:
        return [check for check in told if check.name != "GPUs"] + _gpus(told, nvidia)
    if engine.is_late:
        message = (
            f"it was asked and has not answered for {ENGINE_TIMEOUT_S:g} s\n"
            "sudo systemctl restart docker; journalctl -u docker says what it is busy with"
        )
    elif isinstance(engine.error, LauncherError):
        message = str(engine.error)
    else:
        message = f"it answered with an error: {engine.error}\njournalctl -u docker says more"
    return [checks.no_engine(message), *_gpus([], nvidia)]


def _engine(checkout: Path) -> list[Check]:
    """What the engine says of itself and of what is on it."""
    from tml.docker.connection import connect, describe
    from tml.docker.users import engine_kind

    client, endpoint = connect()
    try:
        info, version = client.info(), client.version()
        said = describe(client, endpoint)
        kind = engine_kind(said)
        memory, processors = info.get("MemTotal") or 0, info.get("NCPU") or 1
        root = info.get("DockerRootDir") or "/"
        return [
            checks.engine(version["Version"], endpoint.url, endpoint.origin, endpoint.context),
            checks.api(version["ApiVersion"]),
            checks.socket_mode(endpoint.url, _mode(endpoint), _has_tls()),
            checks.user(kind, os.getuid(), os.getgid(), "you"),
            *checks.storage(
                info.get("Driver") or "unknown", root, _free(root, kind in ("desktop", "remote"))
            ),
            *checks.machine(memory, processors),
            checks.limits(info),
            checks.shared_memory(processors, memory),
            # Replaced once nvidia-smi has answered; until then it carries the runtime.
            checks.ok("GPUs", said.gpu_runtime or ""),
            *_images(client, checkout),
            *_jobs(client),
        ]
    finally:
        client.close()


def _mode(endpoint: "Endpoint") -> int | None:
    try:
        return os.stat(endpoint.url.removeprefix("unix://")).st_mode & 0o777
    except OSError:
        return None


def _has_tls() -> bool:
    return bool(environment.get(environment.DOCKER_TLS_VERIFY))


def _free(path: str, elsewhere: bool) -> int | None:
    """Free bytes at a path of the engine's machine; None where that is another one."""
    try:
        return None if elsewhere else shutil.disk_usage(path).free
    except OSError:
        return None


def _images(client: "APIClient", checkout: Path) -> Iterable[Check]:
    for variant in IMAGES:
        try:
            wanted = image.hash_inputs(checkout, variant)
        except LauncherError as error:
            yield checks.error("image", str(error), "take a whole checkout, or set TML_BASE")
            return
        there = image.built_from(client, variant)
        size = None if there is None else client.inspect_image(IMAGES[variant]).get("Size")
        yield checks.image(variant, there, wanted, size)


def _jobs(client: "APIClient") -> list[Check]:
    """Jobs by the labels of their containers and networks."""
    filters = {"label": LABEL_OWNER}
    containers = client.containers(all=True, filters=filters)
    networks = client.networks(filters=filters)
    stale = [c["Names"][0].lstrip("/") for c in containers if _is_dead(c)]
    alive = {c["Labels"].get(LABEL_JOB, c["Names"][0]) for c in containers if not _is_dead(c)}
    return checks.jobs(sorted(alive), stale, [n["Name"] for n in networks if _is_dead(n)])


def _is_dead(thing: dict[str, Any]) -> bool:
    return owner.liveness((thing.get("Labels") or {}).get(LABEL_OWNER, "")) == "dead"


# GPUs


def _nvidia_devices() -> list[str]:
    """Names of the GPUs that NVIDIA's driver shows."""
    if not shutil.which("nvidia-smi"):
        there = Path("/proc/driver/nvidia/gpus")
        return ["NVIDIA GPU"] * len(list(there.iterdir())) if there.is_dir() else []
    done = _run("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return [line.strip() for line in (done or "").splitlines() if line.strip()]


def _num_cards() -> int:
    """NVIDIA's display controllers on the bus, with or without a driver."""
    count = 0
    for device in Path("/sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text(), (device / "class").read_text()
        except OSError:
            continue
        count += vendor.strip() == "0x10de" and kind.startswith("0x03")
    return count


def _gpus(told: list[Check], nvidia: _Later[list[str]]) -> list[Check]:
    runtime = next((check.text for check in told if check.name == "GPUs"), None)
    devices = nvidia.get(COMMAND_TIMEOUT_S) or []
    if not told and not devices:
        return []
    return [checks.gpus(devices, _num_cards(), runtime or None)]


# This machine


def _python() -> list[Check]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        docker_py = version("docker")
    except PackageNotFoundError:
        docker_py = None
    return checks.python(sys.version_info[:3], is_venv(), sys.prefix, docker_py)


def _environments(checkout: Path) -> tuple[dict[str, str], str, bool]:
    """Stamps of the sets in .venv, the stamp that they should have, and whether there is one.
    scripts/setup_venv.sh writes them.
    """
    venv = checkout / ".venv"
    digest = sha256()
    for file in sorted((checkout / "requirements").glob("*")):
        digest.update(file.read_bytes())
    stamps = {
        name: (venv / f".tml-{name}").read_text().strip()
        for name in ("launcher", "cpu", "gpu", "dev")
        if (venv / f".tml-{name}").is_file()
    }
    return stamps, digest.hexdigest()[:16], (venv / "bin" / "python").exists()


def _run_disk() -> Check:
    wanted = environment.home() / "tmp" / "runs"
    folder = next(path for path in (wanted, *wanted.parents) if path.exists())
    return checks.run_disk(
        str(folder),
        shutil.disk_usage(folder).free,
        folder.stat().st_uid,
        os.access(folder, os.W_OK | os.X_OK),
        os.getuid(),
    )


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do it: what has only just ended does not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _compose_file(checkout: Path) -> Check:
    try:
        lines = (checkout / ".env").read_text().splitlines()
    except OSError:
        return checks.compose_file(None, {})
    pairs = (line.partition("=") for line in lines if "=" in line and not line.startswith("#"))
    values = {name.strip(): value.strip().strip("'\"") for name, _, value in pairs}
    wanted = {environment.TML_USER: f"{os.getuid()}:{os.getgid()}"}
    with suppress(LauncherError):  # That the checkout is not whole, _images says.
        wanted[environment.TML_IMAGE_INPUTS] = image.hash_inputs(checkout, "cpu")
    return checks.compose_file(values, wanted)


def _pip() -> Check:
    """pip's settings, without passwords, and what of them is not there."""
    from tml.docker.pip_settings import read_pip_settings

    settings = read_pip_settings()
    taken = {
        n: settings[n]
        for n in ("index-url", "extra-index-url", "find-links", "cert")
        if n in settings
    }
    local = [
        word.removeprefix("file://")
        for name in ("find-links", "cert")
        for word in taken.get(name, "").split()
        if word.startswith(("/", "file:///"))
    ]
    missing = [path for path in local if not Path(path).exists()]
    return checks.pip({name: _without_password(value) for name, value in taken.items()}, missing)


def _without_password(value: str) -> str:
    """Addresses without what stands before the @."""
    words = []
    for word in value.split():
        scheme, mark, rest = word.partition("://")
        host, slash, path = rest.partition("/")
        words.append(f"{scheme}{mark}{host.rpartition('@')[2]}{slash}{path}" if mark else word)
    return " ".join(words)


def _run(*argv: str) -> str | None:
    """What a command prints; None where it is not there, fails or hangs."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _first_line(*argv: str) -> str | None:
    return next(iter((_run(*argv) or "").splitlines()), None)


# How it is told


def _show(found: Sequence[Check], summary: str) -> None:
    """Marks and colours on a terminal; elsewhere words, one line a check and one a remedy."""
    if not sys.stdout.isatty():
        for check in found:
            print(f"{check.level:<8} {check.name:<12} {check.text}")
            for line in check.remedy.splitlines():
                print(f"{'':<8} {'':<12} → {line}")
        print(summary)
        return
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in found:
        mark, colour = MARKS[check.level]
        bold = "" if check.level == "ok" else "bold"
        text = Text(check.text)
        for line in check.remedy.splitlines():
            text.append(f"\n→ {line}", style="cyan")
        table.add_row(Text(mark, style=f"bold {colour}"), Text(check.name, style=bold), text)
    console.print(table)
    console.print(Padding(summary, (1, 0, 0, 0)))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
