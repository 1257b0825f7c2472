"""The Docker Engine: find it, and carry out a plan so that nothing is lost and nothing is left
behind.

A container's life: create → wait for its next exit, before it starts → attach → start → follow →
inspect → remove. The first signal to us sends SIGTERM and waits the grace, the second sends
SIGKILL; we then exit with 128 + the signal, and otherwise with the container's own status.
"""

import errno
import gc
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tml.docker import terminal
from tml.docker.errors import ENGINE_FAILED, LauncherError, NoEngineError
from tml.docker.plan import Plan, to_engine
from tml.docker.users import EngineKind, engine_kind
from tml.machines import environment

if TYPE_CHECKING:
    from docker import APIClient

DEFAULT_SOCKET = "unix:///var/run/docker.sock"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where an engine listens, and who said so."""

    url: str
    origin: str
    context: str | None = None
    usual: bool = True
    """`docker` without -H looks there too."""


# Finding the engine


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
    others = [Path.home() / ".docker/run/docker.sock"]
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


def kind_of(client: "APIClient") -> EngineKind:
    """rootful, rootless or remapped."""
    return engine_kind(client.info().get("SecurityOptions") or [])


def owner() -> str:
    """Who removes a container: this process, told from its namesakes by host and boot."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = "unknown"
    return f"{socket.gethostname()}:{os.getpid()}:{boot}"


# Carrying out a plan


def start_detached(client: "APIClient", plan: Plan) -> str:
    """Start the container and leave it running; the engine removes it when it ends. Returns its
    name.
    """
    with _explained(plan):
        container = _create(client, plan)
        try:
            client.start(container)
        except BaseException:
            _remove(client, container)
            raise
    return plan.name


def run_attached(client: "APIClient", plan: Plan, *, pass_interrupt: bool = False) -> int:
    """Run the container to its end and remove it; returns the exit status that the launcher should
    have.

    `pass_interrupt`: on a terminal Ctrl-C goes into the container as a key, as a shell there
    expects.
    """
    events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
    with ExitStack() as stack:
        # First of all, so that a signal at any later moment is an event and not an exception
        # half-way.
        stack.enter_context(_signals_as(events, resize=plan.tty))
        with _explained(plan):
            container = _create(client, plan)
            # Pushed before anything can fail: whatever happens below, the container goes.
            stack.callback(_remove, client, container)
            run = _Run(client, plan, container, events, pass_interrupt)
            return run.follow(stack)


@dataclass(frozen=True)
class _Event:
    kind: str
    """stop (a signal or Ctrl-C), resize, exited, output-ended, lost."""
    signal: int = 0
    error: Exception | None = None


class _Run:
    """One started container, followed to its end."""

    def __init__(
        self,
        client: "APIClient",
        plan: Plan,
        container: str,
        events: "queue.SimpleQueue[_Event]",
        pass_interrupt: bool,
    ) -> None:
        self.client, self.plan, self.container, self.events = client, plan, container, events
        self.pass_interrupt = pass_interrupt
        self.stop_signal = 0
        self.kill_at: float | None = None

    def follow(self, stack: ExitStack) -> int:
        connection = self._attach()
        stack.callback(connection.close)
        registered = threading.Event()
        _thread(self._wait, registered)
        # The engine answers with headers once it waits; some compatible engines only when the wait
        # is over.
        registered.wait(2.0)
        if not self.events.empty():
            # A signal came while the container was made: it never starts.
            event = self.events.get()
            if event.kind == "stop":
                return 128 + event.signal
            self.events.put(event)
        self.client.start(self.container)
        _thread(self._pump_output, connection)
        if self.plan.tty:
            stack.enter_context(terminal.raw_mode())
            self._resize()
        if self.plan.interactive:
            stop_read, stop_write = os.pipe()
            reader = _thread(self._pump_input, connection, stop_read)
            # Later callbacks run first: the reader has let go of stdin before the terminal is
            # restored.
            stack.callback(_end_reader, reader, stop_write)
        self._until_ended()
        return self._exit_code()

    def _attach(self) -> socket.socket:
        params = {"stream": 1, "stdout": 1, "stderr": 1, "stdin": int(self.plan.interactive)}
        # The default, Ctrl-P Ctrl-Q, makes the engine hold back every Ctrl-P: a shell's way to the
        # last command.
        keys = {"detachKeys": "ctrl-_,ctrl-_,ctrl-_"}
        attached: Any = self.client.attach_socket(self.container, params={**params, **keys})
        connection: socket.socket = getattr(attached, "_sock", attached)
        connection.settimeout(None)
        return connection

    def _wait(self, registered: threading.Event) -> None:
        try:
            version = f"{self.client.base_url}/v{self.client.api_version}"
            url = f"{version}/containers/{self.container}/wait"
            response = self.client.post(
                url, params={"condition": "next-exit"}, stream=True, timeout=None
            )
            registered.set()
            response.raise_for_status()
            response.json()
            self.events.put(_Event("exited"))
        except Exception as error:
            registered.set()
            self.events.put(_Event("lost", error=error))

    def _pump_output(self, connection: socket.socket) -> None:
        from docker.utils.socket import frames_iter

        try:
            for stream, data in frames_iter(connection, self.plan.tty):
                terminal.write_all(2 if stream == 2 else 1, data)
        except BrokenPipeError:
            # Whoever read our output has gone, as in `run | head`: nobody wants the rest.
            self.events.put(_Event("stop", signal=signal.SIGPIPE))
        except OSError:
            pass  # The connection was closed under us, because the run is over.
        self.events.put(_Event("output-ended"))

    def _pump_input(self, connection: socket.socket, stop: int) -> None:
        interrupt = None if self.pass_interrupt or not self.plan.tty else self._interrupt
        try:
            terminal.pump_input(connection, interrupt, stop)
        except OSError:
            pass  # The terminal or the container has gone; its end is reported by _wait.
        finally:
            os.close(stop)

    def _interrupt(self) -> None:
        self.events.put(_Event("stop", signal=signal.SIGINT))

    def _until_ended(self) -> None:
        exited = output_ended = False
        while not (exited and output_ended):
            try:
                event = self.events.get(timeout=self._remaining())
            except queue.Empty:
                terminal.say(
                    f"tml: not stopped after {self.plan.stop_grace_s} s: killing {self.plan.name}"
                )
                self._kill("SIGKILL")
                self.kill_at = None
                continue
            if event.kind == "exited":
                exited = True
                self.kill_at = None
            elif event.kind == "output-ended":
                output_ended = True
            elif event.kind == "resize":
                self._resize()
            elif event.kind == "lost":
                raise LauncherError(f"lost the engine while {self.plan.name} ran: {event.error}")
            elif exited:
                return  # It is over; only our own output is blocked, and somebody is impatient.
            else:
                self._stop(event.signal)

    def _remaining(self) -> float | None:
        return None if self.kill_at is None else max(0.0, self.kill_at - time.monotonic())

    def _stop(self, number: int) -> None:
        if not self.stop_signal:
            self.stop_signal = number
            self.kill_at = time.monotonic() + self.plan.stop_grace_s
            terminal.say(
                f"tml: stopping {self.plan.name}, up to {self.plan.stop_grace_s} s; "
                "again to kill it"
            )
            self._kill("SIGTERM")
        else:
            terminal.say(f"tml: killing {self.plan.name}")
            self.kill_at = None
            self._kill("SIGKILL")

    def _kill(self, name: str) -> None:
        from docker.errors import APIError

        try:
            self.client.kill(self.container, name)
        except APIError as error:
            # 409, 404: it has ended on its own in this moment.
            if error.status_code not in (404, 409):
                raise

    def _resize(self) -> None:
        from docker.errors import APIError

        try:
            rows, columns = terminal.window_size()
            if rows and columns:
                self.client.resize(self.container, rows, columns)
        except (APIError, OSError):
            pass  # It has ended, or the terminal has gone.

    def _exit_code(self) -> int:
        state = self.client.inspect_container(self.container)["State"]
        if state.get("OOMKilled"):
            limit = (
                f"--memory {self.plan.memory_bytes >> 20}m"
                if self.plan.memory_bytes
                else "this machine's memory"
            )
            terminal.say(
                f"tml: {self.plan.name} ran out of memory ({limit}) and a process of it was killed"
            )
        return 128 + self.stop_signal if self.stop_signal else int(state["ExitCode"])


def _thread(target: Callable[..., None], *args: Any) -> threading.Thread:
    thread = threading.Thread(target=target, args=args, daemon=True)
    thread.start()
    return thread


def _end_reader(reader: threading.Thread, stop_write: int) -> None:
    os.close(stop_write)  # The other end becomes readable, where the reader has not ended yet.
    reader.join(1.0)


@contextmanager
def _signals_as(events: "queue.SimpleQueue[_Event]", resize: bool) -> Iterator[None]:
    def stop(number: int, _: object) -> None:
        events.put(_Event("stop", signal=number))

    handlers: dict[int, Any] = dict.fromkeys(STOP_SIGNALS, stop)
    if resize:
        handlers[signal.SIGWINCH] = lambda *_: events.put(_Event("resize"))
    # A signal that was ignored stays ignored: nohup means it.
    before = {
        n: signal.getsignal(n)
        for n in handlers
        if signal.getsignal(n) is not signal.SIG_IGN or n == signal.SIGWINCH
    }
    for number in before:
        signal.signal(number, handlers[number])
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _create(client: "APIClient", plan: Plan) -> str:
    config = to_engine(plan, owner())
    if plan.tty:
        # Right from the first line; a resize can only follow once it runs.
        config["HostConfig"]["ConsoleSize"] = list(terminal.window_size())
    created = client.create_container_from_config(config, name=plan.name)
    return str(created["Id"])


def _remove(client: "APIClient", container: str) -> None:
    """Remove the container, running or not, with its anonymous volumes. Silent where it has gone
    already.
    """
    from docker.errors import APIError

    try:
        client.remove_container(container, v=True, force=True)
    except APIError as error:
        if error.status_code not in (404, 409):
            terminal.say(f"tml: could not remove container {container[:12]}: {error.explanation}")
    except OSError as error:
        terminal.say(f"tml: could not remove container {container[:12]}: {error}")


@contextmanager
def _explained(plan: Plan) -> Iterator[None]:
    """The engine's own errors, told so that the caller knows what to do."""
    from docker.errors import APIError, DockerException

    try:
        yield
    except APIError as error:
        raise _explain(plan, error) from error
    except (DockerException, OSError) as error:
        raise LauncherError(f"lost the engine while {plan.name} was handled: {error}") from error


def _explain(plan: Plan, error: Any) -> LauncherError:
    said = str(error.explanation or error).strip()
    text = said.lower()
    if error.status_code == 409 and "already in use" in text:
        return LauncherError(
            f"a container named {plan.name} exists already: choose another --name, or "
            f"docker rm -f {plan.name}"
        )
    if "could not select device driver" in text:
        return LauncherError(
            f"--gpus: this engine has no GPU runtime ({said}). Install the NVIDIA Container "
            "Toolkit, run `nvidia-ctk runtime configure --runtime=docker`, restart the engine; or "
            "leave --gpus out to train on the processor"
        )
    if "network" in text and "not found" in text:
        return LauncherError(f"--network {plan.network}: {said}")
    if error.status_code == 404 and "no such image" in text:
        return LauncherError(f"image {plan.image} is not there: python -m tml.docker build")
    if "executable file not found" in text or "no such file or directory" in text:
        return LauncherError(f"{plan.name} could not start {plan.command[0]}: {said}", 127)
    if "permission denied" in text:
        return LauncherError(f"{plan.name} could not start {plan.command[0]}: {said}", 126)
    return LauncherError(f"the engine refused {plan.name}: {said}", ENGINE_FAILED)
