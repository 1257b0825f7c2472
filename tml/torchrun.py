"""torchrun as a job here needs it: `python -m tml.torchrun [FLAGS of torchrun] script.py …`.

- Without a word on nodes it is one node that meets nobody, of PET_NPROC_PER_NODE processes (1).
- Several nodes that PET_RDZV_CONF tells which of them keeps the store (is_host) meet by
  tml/rendezvous.py; under Compose their number is 1 + TML_WORKERS.
- The threads of a process are its share of the processors here.
- Its end is quiet. torchrun reports a failed process with a traceback of its own, thirty lines
  behind the one that says what is wrong, and always exits with 1. Here the processes speak for
  themselves and the exit status is that of the first to fail, on whichever node: its own, or
  128 + n when signal n ended it or stopped the job.
"""

import argparse
import logging
import os
import secrets
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from tempfile import gettempdir

from tml.machines import container, environment

# A connection that ends is told in one line here; torch's library, which reads this as it is
# loaded, would add a stack.
environment.set_default(environment.TORCH_CPP_LOG_LEVEL, "ERROR")

from torch.distributed import run  # noqa: E402
from torch.distributed.elastic.multiprocessing.api import SignalException  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: E402
from torch.distributed.elastic.rendezvous import rendezvous_handler_registry  # noqa: E402

from tml.distributed import ORPHANED  # noqa: E402
from tml.rendezvous import Nodes, NodesError  # noqa: E402

SHUTDOWN_TIMEOUT_S = 40
"""torchrun's own 30 s from SIGTERM to SIGKILL would cut the launcher's grace of 45 s short."""
PORT = 29500


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun; returns the exit status."""
    # What they would say of a failure or a signal, the lines below and the processes themselves do.
    for name in (*logging.root.manager.loggerDict, "torch.distributed.elastic"):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        _set_num_nodes()
        arguments = run.parse_args(list(sys.argv[1:] if argv is None else argv))
        _set_defaults(arguments)
        nodes = _prepare_nodes(arguments)
        _warn_of_files_of_root()
    except ValueError as error:
        return _fail(str(error), 2)
    code = _run(arguments, nodes)
    if nodes is not None and not nodes.stop():
        # A thread that waits within torch's library for a node that is cut off would end this
        # process by SIGABRT at its end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(arguments: argparse.Namespace, nodes: Nodes | None) -> int:
    try:
        failure = _launch(arguments)
        if nodes is None:
            code, said = failure or (0, "")
        else:
            code, said = nodes.settle(*failure) if failure else nodes.leave()
    except NodesError as error:
        return _fail(str(error), error.exit_code)
    except SignalException as error:  # also while the end is settled with the other nodes
        return 128 + int(error.sigval)
    return _fail(said, code) if said else code


def _launch(arguments: argparse.Namespace) -> tuple[int, str] | None:
    """Run the ranks of this node; returns the exit status and last words of the first to fail."""
    with _errors_said_once():
        try:
            run.run(arguments)
        except ChildFailedError as error:
            return _first_failure(error)
    return None


@contextmanager
def _errors_said_once() -> Iterator[None]:
    """For processes that are started within: see `program.fail`, which makes the folder, so that a
    signal that ends this before they run leaves nothing behind.
    """
    folder = f"{gettempdir()}/tml-said-{secrets.token_hex(16)}"
    try:
        with environment.setting(environment.TML_SAID, folder):
            yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _set_num_nodes() -> None:
    """Compose has no arithmetic: there the number of workers is what is given."""
    workers = environment.compose_workers()
    if workers is not None:
        environment.set_default(environment.PET_NNODES, str(1 + workers))


def _warn_of_files_of_root() -> None:
    """Under Compose, which unlike the launcher does not know who calls it."""
    if environment.compose_workers() is None or environment.spec_type() != "chief":
        return
    if container.is_root_for_another():
        print(
            "warning: this runs as root, so what it writes to your ~/tmp will belong to root; to "
            "own it: docker compose down; python -m tml.docker compose-env; docker compose up",
            file=sys.stderr,
        )


def _set_defaults(arguments: argparse.Namespace) -> None:
    processes = run.determine_local_world_size(arguments.nproc_per_node)
    threads = container.threads_of_process(processes)
    environment.set_default(environment.OMP_NUM_THREADS, str(threads))
    # Threads that wait busily slow each other down by ten times where the processors are shared.
    environment.set_default(environment.OMP_WAIT_POLICY, "PASSIVE")
    environment.set_default(environment.TORCH_ELASTIC_SHUTDOWN_TIMEOUT, str(SHUTDOWN_TIMEOUT_S))


def _prepare_nodes(arguments: argparse.Namespace) -> Nodes | None:
    """Choose how the nodes meet; None where there is one, or torchrun's own way was asked for."""
    if arguments.nnodes in ("1", "1:1"):
        arguments.standalone, arguments.nnodes = True, "1"
        return None
    settings = dict(
        setting.partition("=")[::2] for setting in arguments.rdzv_conf.split(",") if setting
    )
    is_host = settings.get("is_host")
    if arguments.rdzv_backend != "c10d" or is_host is None or not arguments.nnodes.isdigit():
        return None
    host, _, port = arguments.rdzv_endpoint.partition(":")
    durations = {
        name: _seconds(settings[key], f"{environment.PET_RDZV_CONF} {key}")
        for name, key in (("join_timeout_s", "join_timeout"), ("lost_after_s", "lost_after"))
        if key in settings
    }
    workers = environment.compose_workers()
    nodes = Nodes(
        is_chief=is_host.lower() in ("true", "1", "yes"),
        host=host,
        port=int(port or PORT),
        num_nodes=int(arguments.nnodes),
        run_id=arguments.rdzv_id,
        advice="" if workers is None else _COMPOSE_ADVICE,
        **durations,
    )
    arguments.rdzv_backend = nodes.get_backend()
    rendezvous_handler_registry.register(nodes.get_backend(), lambda _: nodes)
    return nodes


_COMPOSE_ADVICE = (
    f"; {environment.TML_WORKERS} says how many there should be: "
    "python -m tml.docker compose-env --workers N sets it, in place of docker compose's --scale"
)


def _seconds(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name}={text!r}: expected a number of seconds") from None


def _first_failure(error: ChildFailedError) -> tuple[int, str]:
    """Exit status of the first process to fail, less those that failed because another had; and
    what it cannot say itself.
    """
    failures = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
    own = [item for item in failures if item[1].exitcode != ORPHANED]
    rank, failure = (own or failures)[0]
    if failure.exitcode >= 0:
        return int(failure.exitcode), ""
    name = signal.Signals(-failure.exitcode).name
    return 128 - int(failure.exitcode), f"process {rank} was ended by {name}"


def _fail(message: str, exit_code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
