"""tml.data.flight: what a worker serves is what its source gives, errors and ends included."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tml.config import ConfigError
from tml.data import flight
from tml.data.flight import Batch, Json, Remote
from tml.data.parquet import DataError

ROOT = Path(__file__).parents[2]
SETTINGS = {"train_data": {"inputs": "a/*"}, "training.seed": 1}
Wait = Callable[..., Any]


class Numbers:
    """Batch i of process r holds i rows of r + i / 10; the second has none; the sixth of process 1
    is broken.
    """

    num_rows: int | None = 60

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.num_errors = 0
        self.closed = threading.Event()

    def start(self) -> Json:
        return {"epoch": 0, "batch": 0}

    def resume(self, positions: list[Json]) -> Json:
        return positions[self.rank]

    def steps_from(self, position: Json) -> int | None:
        return 10 - int(position["batch"])

    def batches(self, position: Json) -> Iterator[Batch]:
        try:
            while "endless" in position:
                yield pa.record_batch({"x": np.zeros(100_000)}), {"after": position}
            for number in range(position["batch"], 10):
                if self.rank == 1 and number == 6:
                    raise DataError("data/x → y.gz, record 6: " + "long " * 5000)
                if self.rank == 2 and number == 6:
                    raise ZeroDivisionError("one by none")
                if self.rank == 3:
                    raise FileNotFoundError(2, "No such file or directory", "data/x")
                self.num_errors = number
                values = np.full(0 if number == 1 else number, self.rank + number / 10)
                yield pa.record_batch({"x": values}), {"after": {"epoch": 0, "batch": number + 1}}
        finally:
            self.closed.set()


@pytest.fixture
def sources() -> list[Numbers]:
    return []


@pytest.fixture
def server(sources: list[Numbers]) -> Iterator[Any]:
    def open_source(rank: int, world_size: int) -> Numbers:
        sources.append(Numbers(rank, world_size))
        return sources[-1]

    server = flight._Server("grpc://127.0.0.1:0", open_source, lambda: SETTINGS)
    yield server
    server.shutdown()


def remote(server: Any, rank: int = 0, **settings: Any) -> Remote:
    where = (f"127.0.0.1:{server.port}",)
    return Remote(where, rank, 4, {**SETTINGS, **settings}, wait_s=5)


def read(remote: Remote, batch: int = 0) -> list[tuple[list[float], int]]:
    """(values, number of the batch behind) of each batch."""
    return [
        (rows.column("x").to_pylist(), message["after"]["batch"])
        for rows, message in remote.batches({"epoch": 0, "batch": batch})
    ]


def test_batches_arrive_in_order_with_their_positions_empty_ones_too(server: Any) -> None:
    found = remote(server)
    assert (found.num_rows, found.start.to_json(), found.start.epoch) == (
        60,
        Numbers(0, 4).start(),
        0,
    )
    assert found.steps_from({"batch": 3}) == 7
    assert found.resume([{"epoch": 2, "batch": 5}, {"epoch": 1}]).to_json()["batch"] == 5
    whole = [([number / 10] * (number if number != 1 else 0), number + 1) for number in range(10)]
    assert read(found) == whole
    assert found.num_errors == 9
    assert read(found, 7) == whole[7:]
    assert read(found, 10) == []


def test_errors_of_the_data_keep_their_words(server: Any) -> None:
    found = remote(server, 1)
    batches = found.batches({"epoch": 0, "batch": 4})
    assert next(batches)[0].num_rows == next(batches)[0].num_rows - 1 == 4
    with pytest.raises(DataError) as caught:
        next(batches)
    assert str(caught.value) == "data/x → y.gz, record 6: " + "long " * 5000
    with pytest.raises(DataError, match=r"^No such file or directory: data/x$"):
        read(remote(server, 3))


def test_a_fault_of_the_worker_is_told_and_logged(
    server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DataError, match="failed: ZeroDivisionError: one by none; its log"):
        read(remote(server, 2), 6)
    assert "ZeroDivisionError" in caplog.text
    with pytest.raises(DataError, match="KeyError"):
        remote(server).steps_from({})
    assert read(remote(server), 9)  # it goes on


def test_a_request_for_other_settings_is_refused(server: Any, sources: list[Numbers]) -> None:
    for change in ({"train_data": {"inputs": "/etc/*"}}, {"more": 1}):
        with pytest.raises(ConfigError, match=f"than the trainer: {next(iter(change))}; start"):
            remote(server, **change)
    with pytest.raises(ConfigError, match="no process 4 of 4"):
        remote(server, 4)
    assert sources == []


def test_a_stream_that_is_left_is_closed(server: Any, sources: list[Numbers], until: Wait) -> None:
    batches = remote(server).batches({"epoch": 0, "endless": True})
    next(batches)
    assert server.num_streams == 1
    batches.close()  # type: ignore[attr-defined]
    until(lambda: server.num_streams == 0)
    assert sources[-1].closed.wait(5)


def test_an_ending_worker_opens_no_stream(server: Any) -> None:
    found = remote(server)
    server.is_ending = True
    with pytest.raises(DataError, match=r"127\.0\.0\.1:\d+ was lost: .*worker is ending"):
        read(found)


def test_a_proxy_is_not_asked(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert len(read(remote(server))) == 10


def test_a_worker_that_does_not_answer_is_waited_for_and_then_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(DataError, match=r"127\.0\.0\.1:1 does not answer \(1 s\): .*refused"):
        Remote(("127.0.0.1:1",), 0, 1, SETTINGS, wait_s=1)
    assert caplog.messages == ["waiting for the data set worker at 127.0.0.1:1 …"]
    with pytest.raises(DataError, match=r"no-such-host:50051 does not answer"):
        Remote(("no-such-host:50051",), 0, 1, SETTINGS, wait_s=1)


SILENT = """
import sys, time
sys.path.insert(0, {tests!r})
from test_flight import SETTINGS, Numbers
from tml.data import flight

class Slow(Numbers):
    def batches(self, position):
        for number, batch in enumerate(super().batches(position)):
            time.sleep(3600 if number == 1 else 0)
            yield batch

server = flight._Server("grpc://127.0.0.1:0", Slow, lambda: SETTINGS)
print(server.port, flush=True)
time.sleep(3600)
"""


def test_a_worker_that_falls_silent_is_asked_and_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flight, "PROBE_S", 1.0)
    program = SILENT.format(tests=str(Path(__file__).parent))
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        try:
            assert process.stdout is not None
            address = f"127.0.0.1:{int(process.stdout.readline())}"
            batches = Remote((address,), 0, 1, SETTINGS, wait_s=30).batches(
                {"epoch": 0, "batch": 5}
            )
            next(batches)
            threading.Timer(4, process.send_signal, [signal.SIGSTOP]).start()
            began = time.monotonic()
            with pytest.raises(
                DataError, match=f"connection to data set worker {address} was lost"
            ):
                next(batches)
            assert time.monotonic() - began > 4  # slow, but there, is no reason
        finally:
            process.kill()


@pytest.mark.parametrize("text", ["host", ":1", "host:", "host:0", "host:99999", "a:1,b"])
def test_an_address_without_host_or_port_is_refused(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TML_DATASETWORKERS", text)
    with pytest.raises(ConfigError, match="no host:port"):
        flight.addresses()


def test_addresses_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TML_DATASETWORKERS", "")
    assert flight.addresses() == ()
    monkeypatch.setenv("TML_DATASETWORKERS", "a:1, b-2:50051,")
    assert flight.addresses() == ("a:1", "b-2:50051")
