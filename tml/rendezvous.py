"""How the nodes of a job meet, and hear of each other's end: a rendezvous for torchrun.

One node, the chief, is known beforehand. It keeps a store at host:port and is rank 0; the others
connect, are numbered, and all begin at the moment the last has come. (torchrun's own, c10d, asks
once a second, numbers nodes by host name, and says nothing of who is missing.) While ranks train,
a thread of each node says twice a second that it is there and looks whether another has failed.
Silence counts only while the one who listens runs itself: a machine that slept has lost nobody.

Keys of the store: joined, node/<rank> (its name), complete; beat/<rank>; failed (the first failure,
as JSON), told (nodes that have read it); left.
"""

import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

import psutil
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)

from tml.distributed import ORPHANED

POLL_S = 0.05
BEAT_S = 0.5
STOOD_STILL_S = 2.0
"""Who has not come to ask for so long did not run: paused, suspended, starved."""
JOIN_TIMEOUT_S = 60
PREPARING_TIMEOUT_S = 1800
"""For a chief that is there and not ready yet: it may be making data before it trains."""
LOST_AFTER_S = 15
TIDY_S = 5.0
"""For ranks to end by themselves once another node has failed; then they are killed."""
CAUSE_S = 3.0
"""For the node that failed to say so, once ranks here have lost those there."""
BEHIND_S = 2.0
"""A node that ends because of another ends so much later: what ends first is the cause."""
_LOST = (RuntimeError,)
"""What a store raises that has gone or does not answer."""


class NodesError(Exception):
    """The nodes did not meet; `exit_code` is this one's."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Failure:
    """The first failure of the job."""

    code: int
    said: str


class Nodes(RendezvousHandler):
    """This node among `num_nodes`; the chief's store is at `host`:`port`.

    advice: what is added to the message where too many or too few nodes come.
    """

    def __init__(
        self,
        *,
        is_chief: bool,
        host: str,
        port: int,
        num_nodes: int,
        run_id: str = "none",
        join_timeout_s: float = JOIN_TIMEOUT_S,
        lost_after_s: float = LOST_AFTER_S,
        advice: str = "",
    ) -> None:
        self._is_chief, self._host, self._port = is_chief, host, port
        self._num_nodes, self._run_id = num_nodes, run_id
        self._join_timeout_s, self._lost_after_s = join_timeout_s, lost_after_s
        self._advice = advice
        self._name = socket.gethostname()
        self._store: TCPStore | None = None
        self._watch: _Watch | None = None
        self._heard_at: float | None = None
        self._vain: Failure | None = None
        self._threads: list[threading.Thread] = []

    # What torchrun calls

    def get_backend(self) -> str:
        """Name of this kind of rendezvous."""
        return "tml"

    @property
    def use_agent_store(self) -> bool:
        """Ranks meet at the store of the nodes."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet the other nodes; raises NodesError where they do not come."""
        if self._store is not None:
            raise NodesError("several nodes start ranks once: restart the whole job instead")
        self._store = self._listen() if self._is_chief else self._connect()
        try:
            rank = self._gather() if self._is_chief else self._join()
        except _LOST as error:
            raise NodesError(self._lost_chief().said, ORPHANED) from error
        self._watch = _Watch(
            self._store.clone(),  # type: ignore[attr-defined]
            rank,
            self._num_nodes,
            self._lost_after_s,
            self._lost_chief(),
        )
        self._watch.start()
        store = _AgentStore(self._run_id, self._store, self._wait_for)
        address = RendezvousStoreInfo(self._own_host(), self._port)
        return RendezvousInfo(store, rank, self._num_nodes, address)

    def num_nodes_waiting(self) -> int:
        """None ever; torchrun asks ten times a second while its ranks run, so this is where ranks
        are ended that wait in vain for those of another node.
        """
        if self._watch is not None and self._watch.failure_now() is not None:
            now = time.monotonic()
            self._heard_at = self._heard_at or now
            if now - self._heard_at > TIDY_S:
                for process in psutil.Process().children(recursive=True):
                    process.kill()
        return 0

    def is_closed(self) -> bool:
        """Never."""
        return False

    def set_closed(self) -> None:
        """Nothing: nodes come once."""

    def get_run_id(self) -> str:
        """Name of the job."""
        return self._run_id

    def shutdown(self) -> bool:
        """Nothing yet: after a failure too torchrun calls this before it says so."""
        return True

    # What the program calls at the end

    def leave(self) -> tuple[int, str]:
        """After a good end here; the chief, whose store the others still read, leaves last. Exit
        status and last words: those of a node that was lost before its own end.
        """
        if self._watch is not None:
            self._watch.stop()
        if self._vain is not None:
            return self._vain.code, self._vain.said
        self._leave("left", wait_s=5.0)
        return 0, ""

    def stop(self) -> bool:
        """End the threads; returns whether they have ended."""
        if self._watch is not None:
            self._watch.stop()
            self._threads.append(self._watch)
        for thread in self._threads:
            thread.join(1.0)
        return not any(thread.is_alive() for thread in self._threads)

    def settle(self, code: int, said: str) -> tuple[int, str]:
        """Exit status and last words of this node, of which a rank ended with `code` and `said`:
        those of the node which failed first. Other nodes are told, where this is the first.
        """
        failure = self._failure_elsewhere(wait_s=CAUSE_S if code == ORPHANED else 0.0)
        if failure is not None:
            time.sleep(BEHIND_S)
            return failure.code, failure.said
        if code != ORPHANED:
            self._tell(Failure(code, f"node {self._name} failed with exit status {code}"))
        return code, said

    def _failure_elsewhere(self, wait_s: float) -> Failure | None:
        deadline = time.monotonic() + wait_s
        while self._watch is not None:
            failure = self._watch.failure_now()
            if failure is not None or time.monotonic() > deadline:
                return failure
            time.sleep(POLL_S)
        return None

    # Meeting

    def _own_host(self) -> str:
        return "localhost" if self._is_chief else self._host

    def _listen(self) -> TCPStore:
        try:
            return self._open(is_master=True)
        except _LOST as error:
            raise NodesError(f"the chief cannot listen at port {self._port}: {error}") from error

    def _connect(self) -> TCPStore:
        """The chief's store. A chief whose name is known and which refuses is preparing."""
        started = absent_since = time.monotonic()
        while True:
            try:
                socket.create_connection((self._host, self._port), timeout=5.0).close()
                return self._open(is_master=False)
            except ConnectionRefusedError as error:
                cause: Exception = error
                absent_since = time.monotonic()
            except (OSError, *_LOST) as error:
                cause = error
            now = time.monotonic()
            if now - absent_since > self._join_timeout_s or now - started > PREPARING_TIMEOUT_S:
                raise NodesError(
                    f"the chief cannot be reached at {self._host}:{self._port} after "
                    f"{now - started:.0f} s ({cause}); has its container ended, or is this one on "
                    "another network?"
                ) from cause
            time.sleep(POLL_S)

    def _open(self, *, is_master: bool) -> TCPStore:
        return TCPStore(
            self._own_host(),
            self._port,
            is_master=is_master,
            timeout=timedelta(seconds=300),
            wait_for_workers=False,
            multi_tenant=True,
        )

    def _gather(self) -> int:
        """On the chief: wait for the others; returns rank 0."""
        assert self._store is not None
        wanted, started, said = self._num_nodes - 1, time.monotonic(), False
        while (joined := self._store.add("joined", 0)) < wanted:
            self._raise_failure()
            waited = time.monotonic() - started
            if waited > self._join_timeout_s:
                message = f"{joined} of {wanted} workers joined after {waited:.0f} s{self._advice}"
                self._tell(Failure(2, message))
                raise NodesError(message)
            if waited > self._join_timeout_s / 2 and not said:
                said = True
                print(
                    f"waiting for workers: {joined} of {wanted} joined after {waited:.0f} s"
                    f"{self._advice}",
                    file=sys.stderr,
                )
            time.sleep(POLL_S)
        self._store.set("complete", "1")
        return 0

    def _join(self) -> int:
        """On a worker: take a number, wait until all are there; returns the rank."""
        assert self._store is not None
        number = self._store.add("joined", 1)
        if number >= self._num_nodes:
            # A moment for those that come with it, so that the message has their number.
            time.sleep(0.5)
            joined, wanted = self._store.add("joined", 0), self._num_nodes - 1
            message = f"{joined} workers have joined a job of {wanted}{self._advice}"
            self._tell(Failure(2, message))
            raise NodesError(message)
        self._raise_failure()
        rank = self._claim_rank(number)
        while not self._store.check(["complete"]):
            self._raise_failure()
            time.sleep(POLL_S)
        return rank

    def _claim_rank(self, number: int) -> int:
        """A rank of its own: the number that its host name begins with, else the order of coming,
        else whichever is free.
        """
        assert self._store is not None
        named = re.match(r"(\d+)-worker", self._name)
        wanted = int(named.group(1)) if named else number
        for rank in (wanted, *range(1, self._num_nodes)):
            if 1 <= rank < self._num_nodes:
                # The store keeps and returns the value of who was first.
                mine = f"{self._name}/{number}"
                if self._store.compare_set(f"node/{rank}", "", mine).decode() == mine:
                    return int(rank)
        raise AssertionError(f"no rank is free for node {number} of {self._num_nodes}")

    # Failures

    def _wait_for(self, has_come: Callable[[], bool]) -> None:
        """As long as the other nodes are there; NodesError where one has failed."""
        assert self._watch is not None
        over = threading.Event()

        def look() -> None:
            while not over.is_set() and not has_come():
                time.sleep(POLL_S)

        thread = self._start(look)
        while thread.is_alive():
            self._vain = self._watch.failure_now()
            if self._vain is not None:
                over.set()
                raise NodesError(self._vain.said, self._vain.code)
            thread.join(POLL_S)

    def _raise_failure(self) -> None:
        assert self._store is not None
        if self._store.check(["failed"]):
            failure = _read_failure(self._store)
            self._store.add("told", 1)
            raise NodesError(failure.said, failure.code)

    def _lost_chief(self) -> Failure:
        return Failure(ORPHANED, f"lost the chief at {self._host}:{self._port}")

    def _tell(self, failure: Failure) -> None:
        """Write the failure down; the chief waits until it has been read."""
        if self._watch is not None:
            self._watch.stop()

        def tell() -> None:
            assert self._store is not None
            self._store.compare_set("failed", "", json.dumps(asdict(failure)))

        self._within(1.0, tell)
        self._leave("told", wait_s=1.0)

    def _leave(self, key: str, wait_s: float) -> None:
        """Count this node under `key`; the chief waits for the count of the others."""
        if self._store is None:
            return
        store, others = self._store, self._num_nodes - 1
        deadline = time.monotonic() + wait_s

        def leave() -> None:
            if not self._is_chief:
                store.add(key, 1)
                return
            others_here = min(others, store.add("joined", 0))
            while store.add(key, 0) < others_here and time.monotonic() < deadline:
                time.sleep(POLL_S)

        self._within(wait_s, leave)

    def _within(self, seconds: float, call: Callable[[], None]) -> None:
        """`call`, which may hang where the store is gone, for so long at the most."""
        self._start(call).join(seconds)

    def _start(self, call: Callable[[], None]) -> threading.Thread:
        def quietly() -> None:
            with suppress(*_LOST):
                call()

        thread = threading.Thread(target=quietly, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread


class _AgentStore(PrefixStore):
    """Where torchrun's nodes wait for one another: as long as the others work. Torch's own `wait`
    hears no signal and of no loss for 300 s, and then leaves a node that still works.
    """

    def __init__(
        self, prefix: str, store: Store, wait_for: Callable[[Callable[[], bool]], None]
    ) -> None:
        super().__init__(prefix, store)
        self._wait_for = wait_for

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Until all of `keys` are there."""
        self._wait_for(lambda: self.check(keys))


class _Watch(threading.Thread):
    """Says that this node is there, and looks for a failure, on a connection of its own."""

    def __init__(
        self, store: Store, rank: int, num_nodes: int, lost_after_s: float, lost_chief: Failure
    ) -> None:
        super().__init__(name="nodes", daemon=True)
        self._store, self._rank, self._lost_after_s = store, rank, lost_after_s
        self._lost_chief = lost_chief
        self._others = [n for n in range(1, num_nodes) if n != rank] if rank == 0 else []
        self._beats = dict.fromkeys(self._others, 0)
        self._silent = dict.fromkeys(self._others, 0)
        self._looked_at = self._asked_at = time.monotonic()
        self._failure: Failure | None = None
        self._stopped = threading.Event()

    def run(self) -> None:
        """Until stopped, or a failure is found."""
        while self._failure is None and not self._stopped.wait(BEAT_S):
            try:
                self._look()
            except _LOST:
                if not self._stopped.is_set():
                    self._failure = self._lost_chief
            self._looked_at = time.monotonic()

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()

    def failure_now(self) -> Failure | None:
        """What has failed elsewhere; also where the store no longer answers."""
        now = time.monotonic()
        if now - self._asked_at > STOOD_STILL_S:
            self._looked_at = now
        self._asked_at = now
        if self._failure is None and not self._stopped.is_set():
            silent_s = now - self._looked_at
            if silent_s > self._lost_after_s:
                self._failure = Failure(
                    ORPHANED, f"{self._lost_chief.said}: nothing heard for {silent_s:.0f} s"
                )
        return self._failure

    def _look(self) -> None:
        self._store.add(f"beat/{self._rank}", 1)
        self._find_silent()
        if self._store.check(["failed"]):
            self._store.add("told", 1)
            self._failure = _read_failure(self._store)

    def _find_silent(self) -> None:
        """On the chief: a node that does not say that it is there has failed. Looks are counted,
        not seconds, which also pass while this node is paused.
        """
        for other in self._others:
            before, self._beats[other] = self._beats[other], self._store.add(f"beat/{other}", 0)
            self._silent[other] = self._silent[other] + 1 if self._beats[other] == before else 0
            silent_s = self._silent[other] * BEAT_S
            if silent_s > self._lost_after_s:
                name = self._store.get(f"node/{other}").decode().partition("/")[0]
                failure = Failure(ORPHANED, f"lost node {name}: nothing heard for {silent_s:.0f} s")
                self._store.compare_set("failed", "", json.dumps(asdict(failure)))


def _read_failure(store: Store) -> Failure:
    return Failure(**json.loads(store.get("failed")))
