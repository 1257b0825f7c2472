"""One container that this process makes, follows and removes: create → wait → start → … → remove.

engine.py runs one on the caller's terminal, gang.py several as one job. Nothing here prints; errors
of the engine become `LauncherError`s that say what to do.
"""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tml.docker import terminal
from tml.docker.errors import ENGINE_FAILED, LauncherError
from tml.docker.owner import this_process
from tml.docker.plan import Plan
from tml.docker.render import to_engine

if TYPE_CHECKING:
    from docker import APIClient

State = dict[str, Any]
"""The engine's own: ExitCode, OOMKilled, Running, StartedAt, FinishedAt, Error …"""


class Container:
    """A container that exists until `remove`."""

    def __init__(self, client: "APIClient", plan: Plan, identifier: str) -> None:
        self.client, self.plan, self.id = client, plan, identifier

    @classmethod
    def create(cls, client: "APIClient", plan: Plan) -> "Container":
        """Create it, not started."""
        config = to_engine(plan, this_process())
        if plan.tty:
            # Right from the first line; a resize can only follow once it runs.
            config["HostConfig"]["ConsoleSize"] = list(terminal.window_size())
        created = client.create_container_from_config(config, name=plan.name)
        return cls(client, plan, str(created["Id"]))

    def start(self) -> None:
        """Start it."""
        self.client.start(self.id)

    def when_ended(self, call: Callable[[Exception | None], None]) -> None:
        """Have a thread call `call` once at the container's next exit, with None, or with the error
        that lost sight of it. Returns when the engine has taken note, so that no exit is missed.
        """
        registered = threading.Event()
        in_thread(self._wait, registered, call)
        # The engine answers with headers once it waits; some compatible engines only when the wait
        # is over.
        registered.wait(2.0)

    def _wait(self, registered: threading.Event, call: Callable[[Exception | None], None]) -> None:
        try:
            version = f"{self.client.base_url}/v{self.client.api_version}"
            url = f"{version}/containers/{self.id}/wait"
            response = self.client.post(
                url, params={"condition": "next-exit"}, stream=True, timeout=None
            )
            registered.set()
            response.raise_for_status()
            response.json()
        except Exception as error:
            registered.set()
            call(error)
        else:
            call(None)

    def attach(self) -> socket.socket:
        """A connection to its streams, before it starts."""
        params = {"stream": 1, "stdout": 1, "stderr": 1, "stdin": int(self.plan.interactive)}
        # The default, Ctrl-P Ctrl-Q, makes the engine hold back every Ctrl-P: a shell's way to the
        # last command.
        keys = {"detachKeys": "ctrl-_,ctrl-_,ctrl-_"}
        attached: Any = self.client.attach_socket(self.id, params={**params, **keys})
        connection: socket.socket = getattr(attached, "_sock", attached)
        connection.settimeout(None)
        return connection

    def kill(self, name: str) -> None:
        """Send a signal, such as SIGTERM; nothing where it has ended already."""
        from docker.errors import APIError

        try:
            self.client.kill(self.id, name)
        except APIError as error:
            # 409, 404: it has ended on its own in this moment.
            if error.status_code not in (404, 409):
                raise

    def resize(self) -> None:
        """Give its terminal the size of ours."""
        from docker.errors import APIError

        try:
            rows, columns = terminal.window_size()
            if rows and columns:
                self.client.resize(self.id, rows, columns)
        except (APIError, OSError):
            pass  # It has ended, or the terminal has gone.

    def state(self) -> State:
        """How it is, or how it ended."""
        state: State = self.client.inspect_container(self.id)["State"]
        return state

    def remove(self) -> None:
        """Remove it, running or not, with its anonymous volumes. Silent where it has gone
        already.
        """
        from docker.errors import APIError

        try:
            self.client.remove_container(self.id, v=True, force=True)
        except APIError as error:
            if error.status_code not in (404, 409):
                terminal.say(f"tml: could not remove container {self.id[:12]}: {error.explanation}")
        except OSError as error:
            terminal.say(f"tml: could not remove container {self.id[:12]}: {error}")


def in_thread(target: Callable[..., None], *args: Any) -> threading.Thread:
    """A started daemon thread."""
    thread = threading.Thread(target=target, args=args, daemon=True)
    thread.start()
    return thread


@contextmanager
def explained(plan: Plan) -> Iterator[None]:
    """The engine's own errors, told so that the caller knows what to do."""
    from docker.errors import APIError, DockerException

    try:
        yield
    except APIError as error:
        raise explain(plan, error) from error
    except (DockerException, OSError) as error:
        raise LauncherError(f"lost the engine while {plan.name} was handled: {error}") from error


def explain(plan: Plan, error: Any) -> LauncherError:
    """What the engine refused, in words that say what to do."""
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
