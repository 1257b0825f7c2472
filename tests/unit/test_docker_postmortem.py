"""Why a job failed: the lines are those that were seen on the engine (26.1, torch 2.13)."""

from dataclasses import replace
from typing import Any

import pytest

from tml.docker.evidence import Ended, program_lines
from tml.docker.plan import Gpus, Mount, Plan, Variable
from tml.docker.postmortem import explain_failure, find_culprit

MIB = 1 << 20
OK_TEXT = "epoch 1 begins"


def plan(**changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "image": "local/torch",
        "command": ("bash", "tml/projects/twhin/scripts/run_in_docker.sh", "--x"),
        "name": "tml-twhin-1a2b",
        "run_id": "1a2b",
        "job": "tml-twhin-1a2b",
        "workdir": "/usr/src/app",
        "env": (),
        "mounts": (
            Mount(source="/home/me/tml", target="/usr/src/app/tml"),
            Mount(source="/home/me/.config", target="/root/.config", read_only=True),
            Mount(source="/home/me/tmp", target="/root/tmp"),
        ),
        "network": "host",
        "user": "1000:1000",
        "interactive": False,
        "tty": False,
        "detach": False,
    }
    return Plan(**{**fields, **changes})


def ended(*lines: str, of: Plan | None = None, **changes: Any) -> Ended:
    fields: dict[str, Any] = {
        "plan": of or plan(),
        "exit_code": 1,
        "stopped_by_us": False,
        "oom_killed": False,
        "memory_peak": None,
        "last_lines": lines,
        "error": "",
        "cut_off": False,
        "first": True,
    }
    return Ended(**{**fields, **changes})


def worker(number: int, *lines: str, **changes: Any) -> Ended:
    of = plan(role="worker", index=number, name=f"tml-twhin-1a2b-worker-{number}")
    return ended(*lines, of=of, **{"first": False, **changes})


PEER = (
    "[rank0]: RuntimeError: [/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553]"
    " Connection closed by peer [172.17.0.2]:7050. This is typically caused by a remote worker"
    " crashing. Check the logs of the remote worker before reporting an error. GLHF! 🏖️"
)


def torchrun(code: int, name: str, rank: int = 1) -> tuple[str, ...]:
    """torchrun's own words after a process of it failed."""
    return (
        "W1121 15:12:04.400000 1 torch/distributed/elastic/multiprocessing/api.py:1028] Sending "
        "process 11 closing signal SIGTERM",
        "E1121 15:12:04.432000 1 torch/distributed/elastic/multiprocessing/api.py:1002] failed "
        f"(exitcode: {code}) local_rank: {rank} (pid: 12) of binary: /opt/venv/bin/python",
        "Traceback (most recent call last):",
        '  File "/opt/venv/bin/torchrun", line 8, in <module>',
        "    raise ChildFailedError(",
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ",
        "====================================================",
        "/h7/rank.py FAILED",
        "----------------------------------------------------",
        "Failures:",
        "[1]:",
        "  rank      : 0 (local_rank: 0)",
        "  exitcode  : -15 (pid: 11)  (SIGTERM)",
        "  traceback : Signal 15 (SIGTERM) received by PID 11",
        "----------------------------------------------------",
        "Root Cause (first observed failure):",
        "[0]:",
        "  time      : 2026-11-21_15:12:04",
        f"  rank      : {rank} (local_rank: {rank})",
        f"  exitcode  : {code} (pid: 12) {name}",
        "====================================================",
    )


CASES: dict[str, tuple[Ended, str, str]] = {
    # name: how it ended, what the cause must say, what the text must say
    "memory, of the container": (
        ended(of=plan(memory_bytes=64 * MIB), exit_code=137, oom_killed=True, memory_peak=64 * MIB),
        "tml-twhin-1a2b was killed (SIGKILL), out of memory: limit 64 MiB, 64 MiB in use",
        "raise --memory above 64 MiB",
    ),
    "memory, of one process of torchrun": (
        ended(PEER, *torchrun(-9, "(SIGKILL)"), of=plan(memory_bytes=900 * MIB), oom_killed=True),
        "ended with exit code 1: a process in it was killed, out of memory: limit 900 MiB",
        "embedding_dim",
    ),
    "memory, of the machine": (
        ended(exit_code=137, oom_killed=True),
        "out of memory: no limit of its own",
        "dmesg",
    ),
    "killed by somebody": (
        ended(OK_TEXT, exit_code=137),
        "was killed (SIGKILL), not from the launcher",
        "dmesg | grep -i 'killed process'",
    ),
    "one process killed by somebody": (
        ended(PEER, *torchrun(-9, "(SIGKILL)")),
        "a process in it (rank 1) got SIGKILL",
        "kill -9",
    ),
    "stopped by somebody": (
        ended(exit_code=143),
        "was ended by SIGTERM, not sent by the launcher",
        "docker stop",
    ),
    "bus error, exit code": (
        ended(exit_code=135, of=plan(shm_bytes=MIB)),
        "was ended by SIGBUS, most likely /dev/shm (1 MiB) was full",
        "raise --shm-size above 1 MiB",
    ),
    "bus error, under bash": (
        ended("bash: line 1:     7 Bus error               python -c 'import os'", exit_code=135),
        "/dev/shm (2 GiB) was full",
        "--shm-size above 2 GiB",
    ),
    "bus error, under torchrun": (
        ended(PEER, *torchrun(-7, "(SIGBUS)")),
        "/dev/shm (2 GiB) was full",
        "--shm-size",
    ),
    "bus error, of a data loader": (
        ended(
            "RuntimeError: DataLoader worker (pid 40) is killed by signal: Bus error. It is "
            "possible that dataloader's workers are out of shared memory."
        ),
        "/dev/shm (2 GiB) was full",
        "num_workers",
    ),
    "a data loader that died": (
        ended("RuntimeError: DataLoader worker (pid(s) 8) exited unexpectedly"),
        "a data loader's process died",
        "--shm-size",
    ),
    "/dev/shm full": (
        ended(
            "RuntimeError: unable to allocate shared memory(shm) for file "
            "</torch_8_3721700517_0>: No space left on device (28)"
        ),
        "/dev/shm (2 GiB) was full",
        "--shm-size",
    ),
    "no GPU runtime": (
        ended(
            exit_code=None,
            error='could not select device driver "" with capabilities: [[gpu]]',
        ),
        "could not be started: the engine has no GPU runtime",
        "NVIDIA Container Toolkit",
    ),
    "GPU memory": (
        ended("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB."),
        "CUDA out of memory",
        "nvidia-smi",
    ),
    "no CUDA in the image": (
        ended("AssertionError: Torch not compiled with CUDA enabled"),
        "Torch not compiled with CUDA enabled",
        "--gpus all",
    ),
    "no driver for the GPUs asked for": (
        ended("RuntimeError: Found no NVIDIA driver on your system.", of=plan(gpus=Gpus(count=-1))),
        "Found no NVIDIA driver",
        "python -m tml.docker doctor",
    ),
    "unknown user": (
        ended("KeyError: 'getpwuid(): uid not found: 12345'"),
        "getpwuid(): uid not found: 12345",
        "--user",
    ),
    "unknown user name": (
        ended(exit_code=None, error="unable to find user nosuch: no matching entries in passwd"),
        "unable to find user nosuch",
        "--user UID:GID",
    ),
    "port taken, in Python": (
        ended(
            "OSError: [Errno 98] Address already in use (while attempting to bind on address "
            "('127.0.0.1', 29500))"
        ),
        "port 29500 is in use already",
        "ss -ltnp 'sport = :29500'",
    ),
    "port taken, in torchrun": (
        ended(
            "torch.distributed.DistNetworkError: The server socket has failed to listen on any "
            "local network address. port: 29511, useIpv6: false, code: -98, name: EADDRINUSE, "
            "message: address already in use",
            "torch.distributed.elastic.rendezvous.api.RendezvousConnectionError: The connection to "
            "the C10d store has failed. See inner exception for details.",
        ),
        "port 29511 is in use already",
        "--network bridge",
    ),
    "port taken, published": (
        ended(
            of=plan(network="bridge"),
            exit_code=None,
            error="driver failed programming external connectivity on endpoint x (98b96cc98c4b): "
            "Bind for 127.0.0.1:6006 failed: port is already allocated",
        ),
        "port 6006 is in use already",
        "--publish OTHER:PORT",
    ),
    "disk full, in our own words": (
        ended(
            "error: No space left on device: /root/tmp/runs/twhin/12/x.pt; make room and start "
            "the same command again",
            exit_code=2,
        ),
        "No space left on device: /home/me/tmp/runs/twhin/12/x.pt",
        "df -h /home/me/tmp/runs/twhin/12/x.pt",
    ),
    "disk full, path unknown": (
        ended("OSError: [Errno 28] No space left on device"),
        "No space left on device",
        "df -h /home/me/tml /home/me/tmp",
    ),
    "disk full, outside the mounts": (
        ended("OSError: [Errno 28] No space left on device: '/tmp/x'"),
        "No space left on device (/tmp/x in the container)",
        "docker system df",
    ),
    "disk full, as torch.save says it": (
        ended(
            "RuntimeError: [enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"
        ),
        "could not be written to its end",
        "df -h",
    ),
    "read-only root": (
        ended("OSError: [Errno 30] Read-only file system: '/x'", of=plan(read_only_root=True)),
        "Read-only file system: /x",
        "leave --read-only out",
    ),
    "read-only data": (
        ended("OSError: [Errno 30] Read-only file system: '/data/x'"),
        "Read-only file system: /data/x",
        "--data is always read-only",
    ),
    "another's folder": (
        ended("error: Permission denied: /root/tmp/runs/twhin", exit_code=2),
        "Permission denied: /root/tmp/runs/twhin, which is /home/me/tmp/runs/twhin here",
        "runs as user 1000:1000",
    ),
    "too many threads": (
        ended("RuntimeError: can't start new thread"),
        "no further process or thread",
        "8192",
    ),
    "too much memory at once": (
        ended(
            "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: "
            "can't allocate memory: you tried to allocate 140737488355328 bytes. Error code 12"
        ),
        "it asked for 128 TiB at once and was refused",
        "batch size",
    ),
    "no such script": (
        ended("bash: nosuch.sh: No such file or directory", exit_code=127),
        "exit code 127: bash: nosuch.sh: No such file or directory",
        "it ran `bash tml/projects/twhin/scripts/run_in_docker.sh --x`",
    ),
    "no such program": (
        ended(
            exit_code=127,
            error="failed to create task for container: failed to create shim task: OCI runtime "
            "create failed: runc create failed: unable to start container process: exec: "
            '"nosuch": executable file not found in $PATH: unknown',
        ),
        'exit code 127: exec: "nosuch": executable file not found in $PATH',
        "python -m tml.docker shell",
    ),
    "not executable": (
        ended("bash: line 1: /etc/passwd: Permission denied", exit_code=126),
        "exit code 126: bash: line 1: /etc/passwd: Permission denied",
        "chmod +x",
    ),
    "a stale image": (
        ended("ModuleNotFoundError: No module named 'pyarrow'"),
        "No module named 'pyarrow'",
        "python -m tml.docker build",
    ),
    "a crash in compiled code": (
        ended(PEER, *torchrun(-11, "(SIGSEGV)")),
        "a process in it got SIGSEGV",
        "PYTHONFAULTHANDLER=1",
    ),
    "NCCL": (
        ended("torch.distributed.DistBackendError: NCCL error in: x.cpp:1, unhandled system error"),
        "NCCL error in: x.cpp:1",
        "NCCL_DEBUG=INFO",
    ),
    "no chief": (
        ended(
            "torch.distributed.elastic.rendezvous.api.RendezvousConnectionError: The connection to "
            "the C10d store has failed. See inner exception for details."
        ),
        "did not find the other containers",
        "look at how the chief began",
    ),
    "orphaned": (
        ended(PEER, exit_code=3),
        "it lost a process that it trained with",
        "look at the other containers",
    ),
    "a peer lost under torchrun": (
        ended(PEER),
        "it lost a process that it trained with",
        "last checkpoint",
    ),
    "removed by somebody": (
        ended(exit_code=None),
        "is gone: somebody removed it",
        "docker events",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_failure_that_is_known_has_a_cause_and_a_remedy(case: str) -> None:
    how, cause, text = CASES[case]
    told = explain_failure([how], "/logs")
    assert cause in told.cause
    assert "\n" not in told.cause
    assert told.text.startswith(told.cause)
    flat = " ".join(told.text.split())
    assert text in flat
    assert "what to do: " in flat


def test_memory_last_looked_at_long_before_is_not_told() -> None:
    early = ended(
        of=plan(memory_bytes=64 * MIB), exit_code=137, oom_killed=True, memory_peak=9 * MIB
    )
    assert explain_failure([early], None).cause.endswith("out of memory: limit 64 MiB")


def test_an_exception_is_the_cause_and_gets_no_made_up_remedy() -> None:
    told = explain_failure(
        [ended("[rank1]: RuntimeError: broken batch", PEER, *torchrun(1, ""))], None
    )
    assert told.cause == "tml-twhin-1a2b ended with exit code 1: RuntimeError: broken batch"
    assert "what to do" not in told.text


def test_the_exception_of_the_rank_that_failed_first_is_taken() -> None:
    lines = ("[rank1]: ValueError: mine", "[rank0]: KeyError: 'later'", *torchrun(1, "", rank=1))
    assert explain_failure([ended(*lines)], None).cause.endswith(": ValueError: mine")


def test_torchruns_own_report_does_not_push_the_programs_lines_away() -> None:
    told = explain_failure([ended("mine 1", "mine 2", *torchrun(1, ""), "after")], None).text
    assert "    mine 1\n    mine 2\n    after" in told
    assert "ChildFailedError" not in told
    assert program_lines(list(torchrun(1, ""))) == list(torchrun(1, ""))


def test_twenty_lines_are_shown_and_the_file_has_the_others() -> None:
    told = explain_failure([ended(*(f"line {n}" for n in range(50)))], "/runs/logs/job").text
    assert "line 29\n" not in told
    assert "    line 30\n" in told
    assert told.endswith("all of its output: /runs/logs/job/chief.log")


def test_a_message_of_several_lines_is_joined_in_the_cause_and_said_once() -> None:
    message = ("error: config /c/local.yaml:", "  training.x: Extra inputs", "  model.y: too small")
    told = explain_failure([ended("reading", *message, exit_code=2)], "/logs")
    assert told.cause == (
        "tml-twhin-1a2b ended with exit code 2: config /c/local.yaml: training.x: Extra inputs "
        "model.y: too small"
    )
    # The output ends with the message: below it stands one short line.
    assert told.text == "tml-twhin-1a2b ended with exit code 2"
    ranks = [f"[rank1]: {line}" for line in message]
    assert explain_failure([ended(*ranks, exit_code=2)], None) == told


@pytest.mark.parametrize(
    "message", ["error: x.y: 3: expected 4 or more", "run.py: error: unrecognized arguments: --x"]
)
def test_a_programs_own_error_is_not_said_again(message: str) -> None:
    told = explain_failure([ended("usage: run.py [-h]", message, exit_code=2)], "/logs")
    assert told.cause.endswith(f"exit code 2: {message.partition('error: ')[2]}")
    assert told.text == "tml-twhin-1a2b ended with exit code 2"
    # Also where torchrun's own words, which nobody needs, stand behind it.
    told = explain_failure([ended(message, PEER, *torchrun(2, ""))], "/logs")
    assert told.cause.endswith(f"exit code 1: {message.partition('error: ')[2]}")
    assert "what to do" not in told.text


def test_a_programs_own_error_names_the_container_among_several() -> None:
    refused = ended("error: x.y: 3: expected 4 or more", exit_code=2)
    told = explain_failure([refused, worker(1, PEER, exit_code=3)], "/logs")
    assert told.cause == "chief ended with exit code 2: x.y: 3: expected 4 or more"
    assert told.text == "chief ended with exit code 2\n  its output: /logs/chief.log"


def test_what_was_said_after_a_message_is_shown() -> None:
    told = explain_failure([ended("error: wrong", "  really", "a later line", exit_code=2)], None)
    assert told.cause.endswith(": wrong really")
    assert "  last lines of tml-twhin-1a2b:" in told.text


def test_a_long_message_is_cut() -> None:
    told = explain_failure([ended("error: " + "x" * 999, exit_code=2)], None)
    assert len(told.cause) == 300


def test_lines_are_shown_without_colours_and_overwritten_progress() -> None:
    told = explain_failure([ended("\x1b[31mred\x1b[0m", "10%\r50%\r99%\r", "")], None).text
    assert "    red\n    99%" in told


def test_a_secret_that_the_program_printed_is_not_repeated() -> None:
    of = plan(env=(Variable(name="HF_TOKEN", value="hf_planted", secret=True),))
    told = explain_failure([ended("ValueError: token hf_planted is wrong", of=of)], None)
    assert "hf_planted" not in told.text
    assert told.cause.endswith("ValueError: token *** is wrong")


# Several containers


def test_each_container_has_a_line() -> None:
    chief = ended(of=plan(), exit_code=143, stopped_by_us=True, first=False)
    killed = worker(1, OK_TEXT, exit_code=137, first=True)
    told = explain_failure([chief, killed], "/logs")
    assert told.cause.startswith("worker-1 was killed (SIGKILL), not from the launcher")
    assert "  worker-1  exit code 137 (SIGKILL), the first to fail, not out of memory" in told.text
    assert "  chief     exit code 143 (SIGTERM), stopped by the launcher" in told.text
    assert "last lines of worker-1:" in told.text
    assert told.text.endswith("/logs/worker-1.log")


def test_who_only_lost_a_peer_is_not_to_blame() -> None:
    chief = ended(PEER, exit_code=3)
    killed = worker(1, exit_code=137)
    assert find_culprit([chief, killed]) is killed
    assert find_culprit([replace(chief, exit_code=1), killed]) is killed


def test_the_first_to_fail_is_to_blame_where_it_has_a_reason_of_its_own() -> None:
    chief = ended("ValueError: mine", exit_code=1)
    assert find_culprit([worker(1, exit_code=137), chief]) is chief


def test_who_was_stopped_by_us_is_not_to_blame() -> None:
    chief = ended(PEER, exit_code=3)
    stopped = worker(1, exit_code=137, stopped_by_us=True)
    assert find_culprit([chief, stopped]) is chief


def test_out_of_memory_is_to_blame_even_where_we_stopped_what_was_left() -> None:
    chief = ended(PEER, exit_code=3)
    starved = worker(1, exit_code=1, oom_killed=True, stopped_by_us=True)
    assert find_culprit([chief, worker(2, exit_code=143, stopped_by_us=True), starved]) is starved


def test_a_container_cut_off_the_network_is_the_cause_of_the_others_end() -> None:
    chief = ended(PEER, exit_code=3)
    lost = worker(2, PEER, exit_code=143, stopped_by_us=True, cut_off=True)
    told = explain_failure([chief, worker(1, PEER, exit_code=3), lost], "/logs")
    assert told.cause == "worker-2 was cut off from the network host"
    assert "docker network disconnect" in told.text
    assert "  worker-1  exit code 3, lost another container" in told.text


def test_a_kill_by_the_launcher_is_called_that() -> None:
    told = explain_failure([ended(OK_TEXT, exit_code=137, stopped_by_us=True)], None)
    assert told.cause == "tml-twhin-1a2b was killed (SIGKILL) by the launcher"
