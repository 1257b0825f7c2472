"""Rows over Arrow Flight: `serve`, a data set worker that reads for trainers, and `Remote`, the
trainer's end of it.

A worker holds no state of a run. A request says who asks (rank and world size), what for (a method
of `Source`, its argument) and with which settings, each as a digest; the worker builds the data set
of that process from its own settings, by the code that a trainer would read with, and refuses a
request whose digests are not its own. So a request can name no file, and what arrives is what
would have been read locally: batches as Arrow record batches, each with the position behind it.

On the wire: a request is a JSON object, as an action's body or as a ticket. An action answers
{"value": …}; each batch of a stream comes with {"after": …, "errors": …}, what follows the last is
{"end": true}. Errors travel as {"error": [kind, text]} in place of an answer or a batch: a gRPC
status holds no long text.
"""

import errno
import hashlib
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import pyarrow as pa
from pyarrow import flight

from tml.config import ConfigError
from tml.data.parquet import DataError
from tml.data.prefetch import prefetch
from tml.machines import environment

logger = logging.getLogger(__name__)

Json = Any
Message = dict[str, Any]
Digests = dict[str, str]
Batch = tuple[pa.RecordBatch, Message]
"""Rows, and {"after": position behind them, …}."""

WAIT_S = 60.0
"""How long a trainer waits at its start for a worker that does not answer yet."""
RETRY_S = 0.5
CALL_S = 600.0
"""Longest that a worker may take to open the data."""
PROBE_S = 15.0
"""A worker that sends nothing for so long is asked whether it is there, and has as long to say so:
one that is cut off the network sends no end either.
"""
DRAIN_S = 30.0
"""How long a worker that was told to end goes on with the streams that are open."""
READS_AHEAD = 2
"""Batches that a worker makes before they are asked for."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)
CHANNEL = (
    ("grpc.enable_http_proxy", 0),  # a worker is on the job's own network
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class Source(Protocol):
    """What a worker serves: the data set of one process; positions are JSON."""

    num_rows: int | None

    @property
    def num_errors(self) -> int:
        """Records left out so far."""
        ...

    def start(self) -> Json:
        """The position before the first row."""
        ...

    def resume(self, positions: list[Json]) -> Json:
        """This process's position, from those of all processes that saved."""
        ...

    def steps_from(self, position: Json) -> int | None:
        """Batches from `position` to the end; None where not known."""
        ...

    def batches(self, position: Json) -> Iterator[Batch]:
        """The batches from `position`, of one schema, each with {"after": …}."""
        ...


OpenSource = Callable[[int, int], Source]
"""(rank, world size) → the data set of that process."""


def digests(settings: Mapping[str, Any]) -> Digests:
    """Name → digest of the setting, a JSON value."""

    def digest(value: Any) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]

    return {name: digest(value) for name, value in settings.items()}


# The worker


def serve(open_source: OpenSource, settings: Callable[[], Mapping[str, Any]]) -> NoReturn:
    """Serve until a signal comes, then end this process: with 0 for SIGTERM, the way a worker ends,
    else 128 + n.

    settings: what decides the rows, by the names that a message uses; called for each request, so
    that data may appear after the worker has started.

    Streams that are open then are gone on with, so that trainers that are stopped at the same
    moment come to their checkpoints; a second signal, or DRAIN_S, ends them.
    """
    # Before any thread is made: all of them leave the signals to this one.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        port = environment.datasetworker_port()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    _check_port(port)
    server = _Server(f"grpc://0.0.0.0:{port}", open_source, settings)
    logger.info("data set worker: serving on port %d", server.port)
    number = signal.sigwait(SIGNALS)
    server.is_ending = True
    deadline = time.monotonic() + DRAIN_S
    while server.num_streams and time.monotonic() < deadline:
        if signal.sigtimedwait(SIGNALS, 0.05) is not None:
            break
    if server.num_streams:
        logger.warning("data set worker: ended with %d open streams", server.num_streams)
    # At once: there is nothing to save, shutdown() would wait for open streams, and the
    # interpreter's own end takes as long as a container should.
    logging.shutdown()
    os._exit(0 if number == signal.SIGTERM else 128 + number)


def _check_port(port: int) -> None:
    """Raise ConfigError where it cannot be listened on: Flight does not say why."""
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            reason = "is in use" if error.errno == errno.EADDRINUSE else str(error.strerror)
            raise ConfigError(
                f"data set worker: port {port} {reason}; end what listens there, or set "
                f"{environment.TML_DATASETWORKER_PORT} to another, here and in "
                f"{environment.TML_DATASETWORKERS} of the trainers"
            ) from error


class _Server(flight.FlightServerBase):  # type: ignore[misc]
    """Answers the requests of trainers; `num_streams` are open at the moment."""

    def __init__(
        self,
        location: str,
        open_source: OpenSource,
        settings: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._open_source, self._settings = open_source, settings
        self._lock = threading.Lock()
        self.num_streams = 0
        self.is_ending = False
        super().__init__(location)

    def do_action(self, context: Any, action: Any) -> list[bytes]:
        """Answer one of Source's methods, or `hello`, with JSON."""
        if action.type == "hello":
            return [b"{}"]
        try:
            answer = {"value": self._answer(action.type, action.body.to_pybytes())}
        except Exception as error:
            answer = _to_message(error)
        return [json.dumps(answer).encode()]

    def do_get(self, context: Any, ticket: Any) -> Any:
        """Stream the batches that a request names."""
        if self.is_ending:
            raise flight.FlightUnavailableError("the data set worker is ending")
        stream = self._stream(ticket.ticket)
        first, message = next(stream)
        return flight.GeneratorStream(first.schema, _as_bytes(first, message, stream))

    def _answer(self, method: str, body: bytes) -> Json:
        request = json.loads(body)
        source = self._open(request)
        if method == "start":
            return {"num_rows": source.num_rows, "position": source.start()}
        if method == "resume":
            return source.resume(request["argument"])
        if method == "steps_from":
            return source.steps_from(request["argument"])
        raise ConfigError(f"data set worker: no such method {method!r}")

    def _open(self, request: Message) -> Source:
        rank, world_size = int(request["rank"]), int(request["world_size"])
        if not 0 <= rank < world_size:
            raise ConfigError(f"data set worker: there is no process {rank} of {world_size}")
        own, theirs = digests(self._settings()), request["settings"]
        if different := [name for name in {**own, **theirs} if own.get(name) != theirs.get(name)]:
            raise ConfigError(
                "the data set worker was started with other settings than the trainer: "
                f"{', '.join(different)}; start both with the same command"
            )
        return self._open_source(rank, world_size)

    def _stream(self, ticket: bytes) -> Iterator[Batch]:
        """The batches and what is behind them, always at least one message; an error is the
        last.
        """
        nothing = pa.record_batch([], pa.schema([]))
        with self._counted():
            try:
                request = json.loads(ticket)
                source = self._open(request)
                position = request["argument"]
                logger.info(
                    "process %d of %d reads from epoch %d",
                    request["rank"],
                    request["world_size"],
                    position["epoch"],
                )
                with prefetch(_with_errors(source, position), READS_AHEAD) as ahead:
                    for rows, message in ahead:
                        nothing = _no_rows(rows.schema)
                        yield rows, message
                yield nothing, {"end": True, "errors": source.num_errors}
            except Exception as error:
                yield nothing, _to_message(error)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self.num_streams += 1
        try:
            yield
        finally:
            with self._lock:
                self.num_streams -= 1


def _with_errors(source: Source, position: Json) -> Iterator[Batch]:
    for rows, message in source.batches(position):
        yield rows, {**message, "errors": source.num_errors}


def _as_bytes(
    rows: pa.RecordBatch, message: Message, rest: Iterator[Batch]
) -> Iterator[tuple[pa.RecordBatch, bytes]]:
    yield rows, json.dumps(message).encode()
    for rows, message in rest:
        yield rows, json.dumps(message).encode()


def _no_rows(schema: pa.Schema) -> pa.RecordBatch:
    return pa.record_batch([pa.array([], type=field.type) for field in schema], schema=schema)


def _to_message(error: Exception) -> Message:
    """An error as what the trainer is told; one that is not the owner's to mend is logged whole."""
    if isinstance(error, ConfigError):
        return {"error": ["config", str(error)]}
    if isinstance(error, DataError):
        return {"error": ["data", str(error)]}
    if isinstance(error, OSError):
        return {"error": ["data", f"{error.strerror or error}: {error.filename}"]}
    logger.error("data set worker: a request failed", exc_info=error)
    return {"error": ["fault", f"{type(error).__name__}: {error}"]}


# The trainer's end


def addresses() -> tuple[str, ...]:
    """The data set workers of this job; none where data are read here."""
    try:
        return environment.datasetworkers()
    except ValueError as error:
        raise ConfigError(str(error)) from error


@dataclass(frozen=True)
class Place:
    """A position as a worker gave it."""

    tree: Message

    @property
    def epoch(self) -> int:
        """Number of the pass over the data, from 0."""
        return int(self.tree["epoch"])

    def to_json(self) -> Message:
        """What meta.json holds of it."""
        return self.tree


class Remote:
    """The data set of one process as a data set worker reads it.

    Process r asks worker r modulo their number: a further worker than there are processes is not
    asked. Raises DataError or ConfigError: those of the worker's reading, in its words, and where
    it does not answer for `wait_s`.
    """

    def __init__(
        self,
        workers: tuple[str, ...],
        rank: int,
        world_size: int,
        settings: Mapping[str, Any],
        wait_s: float = WAIT_S,
    ) -> None:
        self.address = workers[rank % len(workers)]
        self.num_errors = 0
        self._who = {"rank": rank, "world_size": world_size, "settings": digests(settings)}
        self._client = flight.FlightClient(f"grpc://{self.address}", generic_options=[*CHANNEL])
        self._wait(wait_s)
        if rank == 0:
            _announce(workers, world_size)
        opened = self._call("start")
        self.num_rows: int | None = opened["num_rows"]
        self.start = Place(opened["position"])

    def resume(self, positions: list[Json]) -> Place:
        """See Source."""
        return Place(self._call("resume", positions))

    def steps_from(self, position: Json) -> int | None:
        """See Source."""
        steps: int | None = self._call("steps_from", position)
        return steps

    def batches(self, position: Json) -> Iterator[Batch]:
        """See Source; the worker's stream ends when the iterator is closed."""
        with self._named():
            stream = self._client.do_get(flight.Ticket(self._request(position)))
        watch = _Watch(stream, self._hello)
        try:
            while True:
                with self._named(), watch.waiting():
                    chunk = stream.read_chunk()
                message = self._checked(json.loads(chunk.app_metadata.to_pybytes()))
                self.num_errors = message["errors"]
                if "end" in message:
                    return
                yield chunk.data, message
        finally:
            watch.close()
            stream.cancel()

    def _hello(self, timeout_s: float) -> None:
        list(self._client.do_action("hello", flight.FlightCallOptions(timeout=timeout_s)))

    def _wait(self, wait_s: float) -> None:
        deadline = time.monotonic() + wait_s
        said = False
        while True:
            try:
                self._hello(max(deadline - time.monotonic(), 0.1))
                return
            except (pa.ArrowException, OSError) as error:
                if time.monotonic() + RETRY_S > deadline:
                    raise DataError(
                        f"data set worker {self.address} does not answer ({wait_s:g} s): "
                        f"{_reason(error)}; is it running ({environment.SPEC_TYPE}=datasetworker), "
                        f"and is that its address ({environment.TML_DATASETWORKERS})?"
                    ) from error
            if not said:
                logger.info("waiting for the data set worker at %s …", self.address)
                said = True
            time.sleep(RETRY_S)

    def _call(self, method: str, argument: Json = None) -> Json:
        with self._named():
            (result,) = self._client.do_action(
                flight.Action(method, self._request(argument)),
                flight.FlightCallOptions(timeout=CALL_S),
            )
        return self._checked(json.loads(result.body.to_pybytes()))["value"]

    def _request(self, argument: Json) -> bytes:
        return json.dumps({**self._who, "argument": argument}).encode()

    def _checked(self, message: Message) -> Message:
        """The message, unless it is an error."""
        if "error" not in message:
            return message
        kind, text = message["error"]
        if kind == "config":
            raise ConfigError(text)
        if kind == "data":
            raise DataError(text)
        raise DataError(f"data set worker {self.address} failed: {text}; its log says more")

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of the connection become a DataError that names the worker."""
        try:
            yield
        except (pa.ArrowException, OSError, StopIteration) as error:
            raise DataError(
                f"the connection to data set worker {self.address} was lost: {_reason(error)}; its "
                "log may say why; start the job again, it goes on from the last checkpoint"
            ) from error


class _Watch:
    """Cancels a stream whose worker neither sends nor answers while it is waited for."""

    def __init__(self, stream: Any, hello: Callable[[float], None]) -> None:
        self._stream, self._hello = stream, hello
        self._closed = threading.Event()
        self._waiting_since: float | None = None
        self._lost: Exception | None = None
        threading.Thread(target=self._watch, name="flight watch", daemon=True).start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The worker owes a message for as long as the block lasts."""
        self._waiting_since = time.monotonic()
        try:
            yield
        except pa.ArrowException as error:
            raise self._lost or error from error
        finally:
            self._waiting_since = None

    def close(self) -> None:
        """No longer watch."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(PROBE_S):
            since = self._waiting_since
            if since is None or time.monotonic() - since < PROBE_S:
                continue
            try:
                self._hello(PROBE_S)
            except (pa.ArrowException, OSError) as error:
                self._lost = error
                self._stream.cancel()
                return


def _announce(workers: tuple[str, ...], world_size: int) -> None:
    count = min(len(workers), world_size)
    logger.info("training data come from %s", ", ".join(workers[:count]))
    if len(workers) > world_size:
        logger.warning(
            "%d of %d data set workers are not used: a process reads from one, and there are %d",
            len(workers) - world_size,
            len(workers),
            world_size,
        )


def _reason(error: BaseException) -> str:
    """gRPC's message, without its report of circumstances."""
    text = " ".join(str(error).split()) or "the stream ended early"
    text = text.partition(" gRPC client debug context:")[0]
    return text.rpartition("with message: ")[2][:300]
