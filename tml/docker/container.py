"""One container that this process makes, follows and removes: create → wait → start → … → remove.

engine.py runs one on the caller's terminal, gang.py several as one job. Nothing here prints; errors
of the engine become `LauncherError`s that say what to do.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tml.docker import secrets, terminal
from tml.docker.errors import ENGINE_FAILED, LauncherError
from tml.docker.owner import liveness, this_process
from tml.docker.plan import BUILDS, IMAGES, LABEL_JOB, LABEL_OWNER, Plan
from tml.docker.render import to_engine

if TYPE_CHECKING:
    from docker import APIClient

REMOVED = 137
"""Exit status where somebody removed a container: it was killed for that."""
ENGINE_BACK_S = 60.0
"""So long a job waits for an engine that went away: a restart takes less."""

LISTENS_AFTER_S = 5.0
"""So long after its start it is made sure, before a SIGTERM, that a container takes it."""

State = dict[str, Any]
"""The engine's own: ExitCode, OOMKilled, Running, StartedAt, FinishedAt, Error …"""


class Container:
    """A container that exists until `remove`."""

    def __init__(
        self,
        client: "APIClient",
        plan: Plan,
        identifier: str,
        secrets_file: Path | None = None,
    ) -> None:
        self.client, self.plan, self.id = client, plan, identifier
        self.secrets_file = secrets_file
        self._started_at = float("-inf")

    @classmethod
    def create(cls, client: "APIClient", plan: Plan) -> "Container":
        """Create it, not started."""
        from docker.errors import APIError

        secrets_file = secrets.stage(plan)
        try:
            config = to_engine(plan, this_process(), secrets_file)
            if plan.tty:
                # Right from the first line; a resize can only follow once it runs.
                config["HostConfig"]["ConsoleSize"] = list(terminal.window_size())
            created = client.create_container_from_config(config, name=plan.name)
        except BaseException as error:
            secrets.discard(secrets_file)
            if isinstance(error, APIError) and is_taken(error):
                raise name_taken(client, "container", plan.name) from error
            raise
        return cls(client, plan, str(created["Id"]), secrets_file)

    def start(self) -> None:
        """Start it."""
        self.client.start(self.id)
        self._started_at = time.monotonic()
        # It has them now: the mount keeps the file.
        secrets.discard(self.secrets_file)

    def when_ended(self, call: Callable[[Exception | None], None], started: bool = False) -> None:
        """Have a thread call `call` once at the container's next exit, with None, or with the error
        that lost sight of it. Returns when the engine has taken note, so that no exit is missed.

        `started`: it runs, or did: an exit that has been counts too.
        """
        registered = threading.Event()
        in_thread(self._wait, "not-running" if started else "next-exit", registered, call)
        # The engine answers with headers once it waits; some compatible engines only when the wait
        # is over.
        registered.wait(2.0)

    def _wait(
        self,
        condition: str,
        registered: threading.Event,
        call: Callable[[Exception | None], None],
    ) -> None:
        try:
            version = f"{self.client.base_url}/v{self.client.api_version}"
            url = f"{version}/containers/{self.id}/wait"
            response = self.client.post(
                url, params={"condition": condition}, stream=True, timeout=None
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

        if name == "SIGTERM":
            self._until_it_listens()
        try:
            self.client.kill(self.id, name)
        except APIError as error:
            # 409, 404: it has ended on its own in this moment.
            if error.status_code not in (404, 409):
                raise

    def _until_it_listens(self) -> None:
        """Wait until its init has started the command. Before that a SIGTERM is lost on the first
        process, as one of 40 was that were sent right after the start, and the grace would pass for
        nothing.
        """
        from docker.errors import APIError

        with suppress(APIError):  # It has ended, or this engine has no `ps`.
            while time.monotonic() < self._started_at + LISTENS_AFTER_S:
                if len(self.client.top(self.id)["Processes"] or ()) > 1:
                    return
                time.sleep(0.01)

    def resize(self) -> None:
        """Give its terminal the size of ours."""
        from docker.errors import APIError

        try:
            rows, columns = terminal.window_size()
            if rows and columns:
                self.client.resize(self.id, rows, columns)
        except (APIError, OSError):
            pass  # It has ended, or the terminal has gone.

    def look(self) -> tuple[State, bool] | None:
        """Its state, and whether it is on its network; None where it has been removed."""
        from docker.errors import APIError

        try:
            found = self.client.inspect_container(self.id)
        except APIError as error:
            if error.status_code == 404:
                return None
            raise
        return found["State"], self.plan.network in found["NetworkSettings"]["Networks"]

    def memory_in_use(self) -> int | None:
        """Bytes that it uses now, as `docker stats` counts them; None where unknown."""
        from docker.errors import DockerException

        try:
            found = self.client.stats(self.id, stream=False, one_shot=True)["memory_stats"]
        except (DockerException, OSError, KeyError):  # An API before 1.41 has no one_shot.
            return None
        if "usage" not in found:
            return None
        # What files it has read lately is no need of its own.
        stats = found.get("stats", {})
        cached = stats.get("inactive_file", stats.get("total_inactive_file", 0))
        return int(found["usage"]) - int(cached)

    def remove(self) -> None:
        """Remove it, running or not, with its anonymous volumes. Silent where it has gone
        already.
        """
        from docker.errors import APIError

        secrets.discard(self.secrets_file)
        try:
            try:
                self.client.remove_container(self.id, v=True, force=True)
            except APIError:
                raise
            except OSError:
                # The engine goes down, or restarts: it may be back soon.
                wait_for_engine(self.client)
                self.client.remove_container(self.id, v=True, force=True)
        except APIError as error:
            if error.status_code not in (404, 409):
                terminal.say(f"tml: could not remove container {self.id[:12]}: {error.explanation}")
        except OSError as error:
            terminal.say(
                f"tml: could not remove container {self.plan.name}: {error}; once the engine is "
                "back: python -m tml.docker gc"
            )


class MemoryWatch:
    """The most memory that each container was seen to use. Looks now and then, in a thread that
    nobody waits for.
    """

    FIRST_S, EVERY_S = 1.0, 5.0

    def __init__(self, containers: Sequence[Container]) -> None:
        self.containers = containers
        self.peaks: dict[str, int] = {}
        self._over = threading.Event()
        in_thread(self._look)

    def end(self) -> None:
        """Look no more."""
        self._over.set()

    def _look(self) -> None:
        wait_s = self.FIRST_S
        while not self._over.wait(wait_s):
            wait_s = self.EVERY_S
            for container in self.containers:
                used = container.memory_in_use()
                if used is not None:
                    self.peaks[container.id] = max(used, self.peaks.get(container.id, 0))


def wait_for_engine(client: "APIClient", given_up: Callable[[], bool] = lambda: False) -> bool:
    """Whether the engine answers, at once or within ENGINE_BACK_S."""
    deadline = time.monotonic() + ENGINE_BACK_S
    while not engine_answers(client):
        if given_up() or time.monotonic() >= deadline:
            return False
        time.sleep(0.25)
    return True


def engine_answers(client: "APIClient") -> bool:
    """Whether the engine is there now."""
    from docker.errors import DockerException

    try:
        return bool(client.ping())
    except (DockerException, OSError):
        return False


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


def is_taken(error: Any) -> bool:
    """Whether the engine refuses a name, since something has it already."""
    said = str(error.explanation).lower()
    return error.status_code == 409 and ("already in use" in said or "network with name" in said)


def name_taken(
    client: "APIClient", kind: Literal["container", "network"], name: str
) -> LauncherError:
    """The error where a name is in use: what to do depends on who has it."""
    from docker.errors import APIError

    labels: dict[str, str] = {}
    with suppress(APIError, OSError):
        if kind == "container":
            labels = client.inspect_container(name)["Config"]["Labels"] or {}
        else:
            labels = client.inspect_network(name)["Labels"] or {}
    job = labels.get(LABEL_JOB, "")
    if liveness(labels.get(LABEL_OWNER, "")) == "dead":
        remedy = "its launcher is dead, python -m tml.docker gc removes it"
    elif job:
        remedy = f"choose another --name, or python -m tml.docker stop {job}"
    else:
        by_hand = "docker rm -f" if kind == "container" else "docker network rm"
        remedy = f"choose another --name, or {by_hand} {name}"
    return LauncherError(f"a {kind} named {name} exists already: {remedy}")


def no_gpu_runtime(said: str) -> LauncherError:
    """The error where the engine cannot hand out GPUs."""
    return LauncherError(
        f"--gpus: this engine has no GPU runtime ({said}). Install the NVIDIA Container "
        "Toolkit, run `nvidia-ctk runtime configure --runtime=docker`, restart the engine; or "
        "leave --gpus out to train on the processor"
    )


def explain(plan: Plan, error: Any) -> LauncherError:
    """What the engine refused, in words that say what to do."""
    said = str(error.explanation or error).strip()
    text = said.lower()
    if "address pool" in text:
        return LauncherError(
            f"the engine has no addresses left for another network ({said}): python -m tml.docker "
            "gc, then docker network prune"
        )
    if "port is already allocated" in text or "address already in use" in text:
        ports = ", ".join(str(port.host) for port in plan.ports)
        return LauncherError(
            f"--publish: port {ports} of this machine is taken ({said}): choose another, as in "
            "--publish PORT:PORT, or end what listens there"
        )
    if "could not select device driver" in text:
        return no_gpu_runtime(said)
    if "network" in text and "not found" in text:
        return LauncherError(f"--network {plan.network}: {said}")
    if error.status_code == 404 and "no such image" in text:
        builds = {IMAGES[variant]: command for variant, command in BUILDS.items()}
        build = builds.get(plan.image, BUILDS["cpu"])
        return LauncherError(f"image {plan.image} is not there: {build}")
    if "executable file not found" in text or "no such file or directory" in text:
        return LauncherError(f"{plan.name} could not start {plan.command[0]}: {said}", 127)
    if "permission denied" in text:
        return LauncherError(f"{plan.name} could not start {plan.command[0]}: {said}", 126)
    return LauncherError(f"the engine refused {plan.name}: {said}", ENGINE_FAILED)
