"""A process that has imported what our programs import of others, and starts programs by fork: they
begin at once, in place of importing torch for seconds each.

    python fork_server.py LISTENER

tests/programs.py is its client: a request is a connection to the socket of which LISTENER is the
file descriptor, with the words that Python would be given, the environment, and what stdin, stdout
and stderr are to be; the answers are the number of the process and, at its end, its status as of
waitpid. Nothing of this repository is imported before the fork, so a program reads its modules and
its environment as any other does. The server ends when its stdin does.
"""

import atexit
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any, NoReturn

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MAX_BYTES = 1 << 17

Request = dict[str, Any]


FOREIGN = (
    "isal.igzip_lib",
    "numpy.typing",
    "psutil",
    "pyarrow.compute",
    "pyarrow.flight",
    "pyarrow.parquet",
    "pydantic.main",
    "pydantic.types",
    "rich.table",
    "torch.distributed.run",
    "torchrec.distributed",
    "yaml",
)
"""What programs import, is not ours, and costs more than moments."""


def import_foreign() -> None:
    """Import those, with torch set as the programs set it, and leave nothing of ours."""
    import_module("tml.machines.short_waits")
    for name in FOREIGN:
        import_module(name)
    for name in list(sys.modules):
        if name.partition(".")[0] == "tml":
            del sys.modules[name]
    gc.freeze()  # or each process would look through all of it, and so copy it


class Server:
    """Forks on request and tells how it ended."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.selector = selectors.DefaultSelector()
        self.selector.register(0, selectors.EVENT_READ)
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.children: dict[int, tuple[int, socket.socket]] = {}
        """By file descriptor of the process: its number, and who asked for it."""

    def run(self) -> Request | None:
        """Serve until stdin ends, then return None; in each process that it forks, return what
        was asked for.
        """
        while True:
            for key, _ in self.selector.select():
                if key.fd == 0:
                    return None
                if key.fileobj is self.listener:
                    if (request := self._accept()) is not None:
                        return request
                elif key.fd in self.children:
                    self._tell_end(key.fd)
                elif key.data is not None:
                    # Who asked is gone, and takes with it what it asked for.
                    self.selector.unregister(key.fileobj)
                    signal.pidfd_send_signal(key.data, signal.SIGKILL)

    def _accept(self) -> Request | None:
        connection, _ = self.listener.accept()
        text, streams, _, _ = socket.recv_fds(connection, MAX_BYTES, 3)
        request = json.loads(text)
        pid = os.fork()
        if pid == 0:
            connection.close()
            self._forget()
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            return dict(request)
        for stream in streams:
            os.close(stream)
        process = os.pidfd_open(pid)
        self.children[process] = (pid, connection)
        self.selector.register(process, selectors.EVENT_READ)
        connection.send(str(pid).encode())
        if request["tied"]:
            self.selector.register(connection, selectors.EVENT_READ, process)
        return None

    def _tell_end(self, process: int) -> None:
        pid, connection = self.children.pop(process)
        _, status = os.waitpid(pid, 0)
        self.selector.unregister(process)
        os.close(process)
        if connection in self.selector.get_map():
            self.selector.unregister(connection)
        with connection, suppress(OSError):  # nobody may wait for it any more
            connection.send(str(status).encode())

    def _forget(self) -> None:
        """In a new process: close what is the server's."""
        self.selector.close()
        self.listener.close()
        for process, (_, connection) in self.children.items():
            os.close(process)
            connection.close()


def become(request: Request) -> int:
    """Be the program that was asked for; returns its exit status."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    first, *others = request["argv"]
    if first == "-u":
        sys.stdout.reconfigure(write_through=True)
        first, *others = others
    if first == "-m":
        sys.path[0] = request["cwd"]
        sys.argv = others
        program = partial(runpy.run_module, others[0], alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(first)
        sys.argv = [first, *others]
        program = partial(runpy.run_path, first)
    try:
        program(run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def end(code: int) -> NoReturn:
    """End as Python does, but for taking every module apart, which would copy the memory that is
    shared with the server.
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.path.insert(1, REPOSITORY)
    import_foreign()
    server = Server(socket.socket(fileno=int(sys.argv[1])))
    asked = server.run()
    del server
    if asked is not None:
        end(become(asked))
