"""tml.torchrun: defaults for one node, and several nodes that meet, end and fail together."""

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import programs
from tml.machines import container, environment
from tml.rendezvous import TIDY_S

REPOSITORY = Path(__file__).resolve().parents[2]
RANK = """
import os, signal, sys, time
from tml import distributed, program
def run():
    with distributed.join(60.0) as job:
        distributed.barrier()
        share = os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"]
        place = f"rank {job.rank} of {job.world_size} node {os.environ['GROUP_RANK']}"
        # One write, so that lines of processes do not mix.
        sys.stdout.write(f"{place} {share}\\n")
        sys.stdout.flush()
        mode = sys.argv[1:]
        if mode and job.rank == int(mode[1]):
            if mode[0] == "exit": os._exit(int(mode[2]))
            if mode[0] == "kill": os.kill(os.getpid(), signal.SIGKILL)
            if mode[0] == "node": os.kill(os.getppid(), signal.SIGKILL); os._exit(1)
            if mode[0] == "leave": return
        if mode and mode[0] == "leave": time.sleep(600)
        if mode and mode[0] == "until":
            while not distributed.any_process(os.path.exists(mode[2])): time.sleep(0.02)
            return
        while mode: distributed.any_process(False); time.sleep(0.02)
sys.exit(program.exit_code(run))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """What ranks run. With `exit R CODE`, `kill R` or `node R` rank R fails; with `leave R` it
    alone ends well; with `until R FILE` all work until that file is there.
    """
    (tmp_path / "rank.py").write_text(RANK)
    return tmp_path / "rank.py"


def start(argv: list[str], fork: bool = True, **env: str | None) -> programs.Program:
    """tml.torchrun with an environment of its own. Where its ranks are told apart from outside,
    they are processes that it started itself.
    """
    names = [name for name in os.environ if name.startswith(("PET_", "TML_"))]
    own = {**dict.fromkeys([*names, "OMP_NUM_THREADS", "OMP_WAIT_POLICY"]), **env}
    if argv[1:2] in (["node"], ["until"], ["leave"]):
        own["PYTHON_EXEC"] = None
    return programs.start("-m", "tml.torchrun", *argv, fork=fork, **own)


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def start_node(
    number: int, port: int, argv: list[str], conf: str = "", fork: bool = True, **env: str
) -> programs.Program:
    """A node on this machine, as a container of a job has it; 0 is the chief."""
    settings = {
        "PET_NNODES": "2",
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": f"localhost:{port}",
        "PET_RDZV_ID": "job",
        "PET_RDZV_CONF": f"is_host={str(number == 0).lower()}{conf}",
        "TML_MACHINE_SHARE": "2",
    }
    given = {name: value for name, value in {**settings, **env}.items() if value}
    return start(argv, fork, **given)


def ends(*nodes: programs.Program) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each."""
    told = [node.communicate(timeout=120) for node in nodes]
    return [(node.returncode, *words) for node, words in zip(nodes, told, strict=True)]


def signal_all(number: int, *nodes: programs.Program) -> None:
    """Send a signal to nodes and their ranks, as `docker pause` stops all of a container."""
    for node in nodes:
        for process in (psutil.Process(node.pid), *psutil.Process(node.pid).children(True)):
            process.send_signal(number)


def wait_until_training(until: Any, *nodes: programs.Program) -> None:
    """Each has said its first line."""
    for node in nodes:
        until(lambda node=node: node.said().startswith("rank"), 200)


def test_one_node_of_one_process_is_the_default(script: Path) -> None:
    ((code, output, errors),) = ends(start([str(script)]))
    processors = len(os.sched_getaffinity(0))
    assert (code, errors) == (0, "")
    assert output == f"rank 0 of 1 node 0 ('{processors}', 'PASSIVE')\n"


def test_flags_and_variables_of_torchrun_still_count(script: Path) -> None:
    by_flag = start(["--standalone", "--nproc_per_node", "2", str(script)])
    by_variable = start([str(script)], PET_NPROC_PER_NODE="2", OMP_NUM_THREADS="7")
    for code, output, errors in ends(by_flag, by_variable):
        assert (code, errors) == (0, "")
        assert sorted(line[:13] for line in output.splitlines()) == [
            "rank 0 of 2 n",
            "rank 1 of 2 n",
        ]
    assert "('7', 'PASSIVE')" in output


def test_one_node_meets_nobody_whatever_it_is_told(script: Path) -> None:
    node = start_node(0, free_port(), [str(script)], PET_NNODES="1")
    assert [code for code, _, _ in ends(node)] == [0]


def test_two_nodes_train_quietly_with_the_chief_as_rank_0(script: Path) -> None:
    port = free_port()
    worker = start_node(1, port, [str(script)])
    time.sleep(1.0)  # It waits for the chief.
    chief = start_node(0, port, [str(script)])
    (code, output, errors), other = ends(chief, worker)
    assert (code, errors, other[0], other[2]) == (0, "", 0, "")
    assert output.startswith("rank 0 of 2 node 0")
    assert other[1].startswith("rank 1 of 2 node 1")
    assert "('1', " in output  # Two processors at the most, shared by two.


def test_under_compose_the_number_of_workers_says_how_many_nodes(script: Path) -> None:
    port = free_port()
    env = {"PET_NNODES": "", "TML_MACHINE_SHARE": "", "TML_WORKERS": "1"}
    nodes = [start_node(number, port, [str(script)], **env) for number in (0, 1)]
    assert [code for code, _, _ in ends(*nodes)] == [0, 0]


@pytest.mark.parametrize("failing", [0, 1])
def test_every_node_ends_with_the_status_of_the_first_to_fail(script: Path, failing: int) -> None:
    port = free_port()
    argv = [str(script), "exit", str(failing), "7"]
    nodes = [start_node(number, port, argv) for number in (0, 1)]
    ended = ends(*nodes)
    assert [code for code, _, _ in ended] == [7, 7]
    assert "Traceback" not in ended[0][2] + ended[1][2]
    other = ended[1 - failing][2]
    assert f"process {1 - failing} lost the connection to another process of the job" in other
    assert "failed with exit status 7" in other
    assert ended[failing][2] == ""


def test_a_killed_process_is_named(script: Path) -> None:
    port = free_port()
    nodes = [start_node(number, port, [str(script), "kill", "1"]) for number in (0, 1)]
    chief, worker = ends(*nodes)
    assert (chief[0], worker[0]) == (137, 137)
    assert worker[2] == "error: process 1 was ended by SIGKILL\n"


@pytest.mark.parametrize("failing", [0, 1])
def test_a_node_that_vanished_is_told_from_one_that_failed(script: Path, failing: int) -> None:
    port = free_port()
    argv = [str(script), "node", str(failing)]
    # What torch's library would add to this is settled before it is loaded.
    ended = ends(*(start_node(number, port, argv, fork=False) for number in (0, 1)))
    assert [code for code, _, _ in ended] == ([-9, 3] if failing == 0 else [3, -9])
    said = ended[1 - failing][2]
    assert "lost the connection to another process" in said
    assert "frame #" not in said


@pytest.mark.parametrize("first", [0, 1])
def test_nodes_that_all_stood_still_have_lost_nobody(
    script: Path, tmp_path: Path, until: Any, first: int
) -> None:
    port, end = free_port(), tmp_path / "end"
    argv = [str(script), "until", "0", str(end)]
    nodes = [start_node(number, port, argv, ",lost_after=5") for number in (0, 1)]
    wait_until_training(until, *nodes)
    signal_all(signal.SIGSTOP, *nodes)
    time.sleep(8.0)
    signal_all(signal.SIGCONT, nodes[first])
    time.sleep(1.5)  # One comes back before the other and hears nothing of it.
    signal_all(signal.SIGCONT, nodes[1 - first])
    time.sleep(TIDY_S + 1.5)  # Ranks are killed so long after a loss.
    end.touch()
    assert [(code, errors) for code, _, errors in ends(*nodes)] == [(0, ""), (0, "")]


@pytest.mark.parametrize("silent", [0, 1])
def test_a_node_that_alone_falls_silent_is_lost_in_the_end(
    script: Path, until: Any, silent: int
) -> None:
    port = free_port()
    argv = [str(script), "until", "0", "/none"]
    nodes = [start_node(number, port, argv, ",lost_after=5") for number in (0, 1)]
    wait_until_training(until, *nodes)
    signal_all(signal.SIGSTOP, nodes[silent])
    time.sleep(2.5)
    assert nodes[1 - silent].poll() is None
    ((code, _, errors),) = ends(nodes[1 - silent])
    signal_all(signal.SIGKILL, nodes[silent])
    ends(nodes[silent])
    assert code == 3
    lost = "lost the chief at" if silent == 0 else "lost node"
    assert f"error: {lost}" in errors
    assert "nothing heard for" in errors


def test_a_node_that_has_ended_well_waits_for_the_others_and_hears_of_their_loss(
    script: Path, until: Any
) -> None:
    port = free_port()
    argv = [str(script), "leave", "0"]
    nodes = [start_node(number, port, argv, ",lost_after=3") for number in (0, 1)]
    wait_until_training(until, *nodes)
    time.sleep(5.0)  # Longer than a silence may last: at its end too a node says that it is there.
    assert [node.poll() for node in nodes] == [None, None]
    signal_all(signal.SIGKILL, nodes[1])
    (code, _, errors), _ = ends(*nodes)
    assert (code, errors.count("\n")) == (3, 1)
    assert "error: lost node" in errors


def test_a_node_that_waits_for_the_others_at_its_end_can_be_stopped(
    script: Path, until: Any
) -> None:
    port = free_port()
    nodes = [start_node(number, port, [str(script), "leave", "0"]) for number in (0, 1)]
    wait_until_training(until, *nodes)
    time.sleep(2.0)
    nodes[0].terminate()
    assert nodes[0].wait(30) == 143  # the other node would work for minutes
    signal_all(signal.SIGKILL, nodes[1])
    ends(*nodes)


def test_a_chief_that_does_not_come_is_named_with_its_address(script: Path) -> None:
    node = start_node(
        1, 29500, [str(script)], ",join_timeout=1", PET_RDZV_ENDPOINT="chief.invalid:29500"
    )
    ((code, _, errors),) = ends(node)
    assert code == 2
    assert "the chief cannot be reached at chief.invalid:29500 after" in errors
    assert len(errors.splitlines()) == 1


def test_workers_that_do_not_come_are_counted(script: Path) -> None:
    port = free_port()
    env = {"PET_NNODES": "3"}
    nodes = [start_node(n, port, [str(script)], ",join_timeout=6", **env) for n in (0, 1)]
    chief, worker = ends(*nodes)
    assert (chief[0], worker[0]) == (2, 2)
    assert "waiting for workers: 1 of 2 joined after 3 s" in chief[2]
    assert "error: 1 of 2 workers joined after 6 s" in chief[2]
    assert "error: 1 of 2 workers joined after 6 s" in worker[2]


def test_more_workers_than_compose_was_told_of_end_the_job(script: Path) -> None:
    port = free_port()
    env = {"PET_NNODES": "", "TML_WORKERS": "1"}
    argv = [str(script), "exit", "9", "0"]
    nodes = [start_node(number, port, argv, **env) for number in (0, 1, 2)]
    ended = ends(*nodes)
    assert [code for code, _, _ in ended] == [2, 2, 2]
    for _, _, errors in ended:
        assert "2 workers have joined a job of 1; TML_WORKERS says how many" in errors
        assert "compose-env --workers" in errors


def test_a_number_that_is_none_is_refused_in_one_line(script: Path) -> None:
    for env in ({"PET_NPROC_PER_NODE": "many"}, {"TML_WORKERS": "x"}):
        ((code, _, errors),) = ends(start([str(script)], **env))
        assert (code, len(errors.splitlines())) == (2, 1), errors


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be root for another")
def test_root_for_another_is_known_by_whose_the_checkout_is(tmp_path: Path) -> None:
    assert not container.is_root_for_another(tmp_path / "none")
    assert not container.is_root_for_another(tmp_path)
    os.chown(tmp_path, 4242, 4343)
    assert container.is_root_for_another(tmp_path)


def test_threads_are_shared_by_the_containers_and_limited_by_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(environment.TML_WORKERS, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setattr(container, "_processor_limit", lambda: float("inf"))
    monkeypatch.setenv(environment.TML_MACHINE_SHARE, "3")
    assert [container.threads_of_process(n) for n in (1, 2, 5)] == [4, 2, 1]
    monkeypatch.setattr(container, "_processor_limit", lambda: 2.5)
    assert [container.threads_of_process(n) for n in (1, 2, 5)] == [2, 1, 1]


@pytest.mark.parametrize(
    ("files", "processors"),
    [
        ({}, float("inf")),
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, float("inf")),
        ({"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, 2.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, float("inf")),
    ],
)
def test_the_limit_is_read_from_either_version_of_cgroups(
    tmp_path: Path, files: dict[str, str], processors: float
) -> None:
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    assert container._processor_limit(tmp_path) == processors
