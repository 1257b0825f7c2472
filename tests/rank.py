"""Stands for Python where torchrun starts a rank in our tests: has tests/fork_server.py start it.

    python -IS rank.py SOCKET WORD...

It forwards what signals it gets, ends as the rank does, and takes the rank along when it is killed.
Imports little, as each start of a rank costs what this costs.
"""

import json
import os
import signal
import socket
import sys


def ask(path: str, streams: list[int], **request: object) -> "tuple[socket.socket, int]":
    """Ask the server at `path` for a process with these standard streams; returns the connection
    that will tell its end, and its number.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(path)
    socket.send_fds(connection, [json.dumps(request).encode()], streams)
    return connection, int(connection.recv(64))


def main(path: str, *argv: str) -> None:
    """Be the rank for those who watch it."""
    passed_on = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
    signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)
    connection, pid = ask(
        path,
        [0, 1, 2],
        argv=argv,
        env=dict(os.environ),
        cwd=os.getcwd(),
        tied=True,
    )
    for number in passed_on:
        signal.signal(number, lambda number, _: os.kill(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)
    code = os.waitstatus_to_exitcode(int(connection.recv(64)))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
