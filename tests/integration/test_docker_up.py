"""`up` and `--detach` on the real engine: several containers as one job, the gang rule, signals,
restarts, logs, records, and that nothing is left behind.
"""

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.stand_in import GRACEFUL, containers, networks, record, records, was_interrupted
from tml.docker import connection
from tml.docker.owner import liveness

pytestmark = pytest.mark.docker


def nothing_is_left(client: Any) -> bool:
    """Neither a container nor a network of the stand-in project."""
    return not containers(client) and not networks(client)


def log(launcher: Any, member: str) -> str:
    """What was kept of a member of the only job."""
    (path,) = launcher.home.glob(f"tmp/runs/standin/logs/*/{member}.log")
    return str(path.read_bytes().decode())


def wait_for_lines(process: Any, *lines: str) -> list[str]:
    """Read stdout until all `lines` were seen; returns what was read."""
    read: list[str] = []
    while not all(any(line in r for r in read) for line in lines):
        text = process.stdout.readline()
        assert text, (lines, read, process.stderr.read())
        read.append(text)
    return read


def all_ready(process: Any, workers: int = 1) -> None:
    """Wait until the chief and its workers say `ready`."""
    members = ["chief ", *(f"worker-{n + 1} " for n in range(workers))]
    seen: set[str] = set()
    while len(seen) < len(members):
        line = process.stdout.readline()
        assert line, process.stderr.read()
        if line.rstrip().endswith("| ready"):
            seen.add(line.partition("|")[0])


# Output


def test_output_has_prefixes_and_is_kept_in_the_run_folder(launcher: Any, client: Any) -> None:
    launcher.script("echo out of $SPEC_TYPE; echo told >&2; printf 'no newline'\n")
    done = launcher("up", "standin", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        "chief    | no newline",
        "chief    | out of chief",
        "worker-1 | no newline",
        "worker-1 | out of worker",
        "worker-2 | no newline",
        "worker-2 | out of worker",
    ]
    for member in ("chief   ", "worker-1", "worker-2"):
        assert f"{member} | told\n" in done.stderr
        kept = log(launcher, member.strip()).splitlines()
        assert {"told", "no newline"} < set(kept)
    assert nothing_is_left(client)


def test_much_output_stays_in_whole_lines_and_in_order(launcher: Any) -> None:
    launcher.script("seq -f $SPEC_TYPE-%.0f 30000\n")
    done = launcher("up", "standin")
    lines = done.stdout.splitlines()
    for member, role in (("chief   ", "chief"), ("worker-1", "worker")):
        mine = [line for line in lines if line.startswith(member)]
        assert mine == [f"{member} | {role}-{n}" for n in range(1, 30001)]
    assert len(lines) == 60000
    assert log(launcher, "chief") == "".join(f"chief-{n}\n" for n in range(1, 30001))


def test_timestamps_and_progress_bars(launcher: Any) -> None:
    launcher.script("printf '10%%\\r50%%\\r100%%\\n'\n")
    done = launcher("up", "standin", "--timestamps")
    pattern = r"(chief   |worker-1) \| \d\d:\d\d:\d\d\.\d{3} 100%"
    assert len(done.stdout.splitlines()) == 2
    assert all(re.fullmatch(pattern, line) for line in done.stdout.splitlines()), done.stdout
    assert log(launcher, "chief") == "10%\r50%\r100%\n"


def test_secrets_are_stars_in_what_is_shown_and_kept(launcher: Any) -> None:
    launcher.script("echo token $TOKEN; echo pin $PIN; exit 3\n")
    done = launcher("up", "standin", "--env=TOKEN", "--env=PIN", TOKEN="planted-one", PIN="123")
    assert "chief    | token ***\n" in done.stdout
    assert "chief    | pin 123\n" in done.stdout
    assert "planted-one" not in done.stdout + done.stderr + log(launcher, "chief")
    assert "planted-one" not in json.dumps(record(launcher))


def test_logs_that_cannot_be_kept_are_said_once_and_the_job_goes_on(launcher: Any) -> None:
    launcher.script("echo one; echo two\n")
    (launcher.home / "tmp" / "runs").mkdir(parents=True)
    (launcher.home / "tmp" / "runs" / "standin").write_text("in the way\n")
    done = launcher("up", "standin")
    assert done.returncode == 0
    assert done.stderr.count("cannot keep the output in") == 1
    assert done.stdout.count("| two") == 2


def test_a_full_disk_does_not_end_the_job(launcher: Any) -> None:
    launcher.script("echo one; echo two\n")
    logs = launcher.home / "tmp" / "runs" / "standin" / "logs" / "tml-standin-full"
    logs.mkdir(parents=True)
    (logs / "chief.log").symlink_to("/dev/full")
    done = launcher("up", "standin", "--name", "tml-standin-full")
    assert (done.returncode, done.stdout.count("| two")) == (0, 2)
    assert done.stderr.count("No space left on device; the job goes on") == 1
    assert (logs / "worker-1.log").read_text() == "one\ntwo\n"


# Exit status and the gang rule


@pytest.mark.parametrize("who", ["chief", "worker"])
@pytest.mark.parametrize("status", [1, 3, 42, 125, 126, 127, 137, 143, 255])
def test_the_first_failure_is_the_status_of_the_job(
    launcher: Any, client: Any, who: str, status: int
) -> None:
    launcher.script(f"[ $SPEC_TYPE = {who} ] && exit {status}\n{GRACEFUL}")
    done = launcher("up", "standin")
    assert done.returncode == status, done.stderr
    member = {"chief": "chief", "worker": "worker-1"}[who]
    other = {"chief": "worker-1", "worker": "chief"}[who]
    assert f"tml: {member} ended with exit code {status}: stopping {other}" in done.stderr
    assert nothing_is_left(client)
    found = record(launcher)
    assert (found["state"], found["exit_code"]) == ("ended", status)
    assert found["cause"].startswith(member)


def test_the_others_are_stopped_with_grace_and_killed_after_it(launcher: Any) -> None:
    launcher.script(
        "until [ -e /root/tmp/go ]; do [ $SPEC_TYPE = chief ] && break; sleep 0.05; done\n"
        "[ $SPEC_TYPE = worker ] && exit 9\n" + GRACEFUL
    )
    for linger, said in (("0", ["saving", "saved"]), ("60", ["saving"])):
        process = launcher.start("up", "standin", "--stop-grace=1", f"--env=LINGER={linger}")
        wait_for_lines(process, "chief    | ready")
        (launcher.home / "tmp" / "go").touch()
        out, err = process.communicate(timeout=30)
        (launcher.home / "tmp" / "go").unlink()
        assert process.returncode == 9
        assert [line.partition("| ")[2] for line in out.splitlines()] == said
        assert ("not stopped after 1 s: killing chief" in err) == (linger == "60")


def test_who_failed_first_is_told_by_the_engines_clock(launcher: Any) -> None:
    # Each but one fails as soon as it misses the one that failed: nothing lies between.
    launcher.script(
        "touch /root/tmp/up-$(hostname)\n"
        "until [ $(ls /root/tmp | grep -c up-) = 3 ]; do sleep 0.02; done\n"
        "[ $(hostname) = 2-worker ] && { sleep 0.5; touch /root/tmp/gone; exit 5; }\n"
        "until [ -e /root/tmp/gone ]; do sleep 0.005; done; sleep 0.1; exit 6\n"
    )
    for _ in range(3):
        done = launcher("up", "standin", "--workers", "2")
        assert done.returncode == 5, done.stderr
        assert "worker-2 ended with exit code 5" in done.stderr
        for path in (launcher.home / "tmp").glob("*"):
            if path.is_file():
                path.unlink()


def test_success_is_only_when_all_have_ended_well(launcher: Any) -> None:
    launcher.script("[ $SPEC_TYPE = chief ] && exit 0; sleep 1; exit $1\n")
    assert launcher("up", "standin", "--", "0").returncode == 0
    assert launcher("up", "standin", "--", "4").returncode == 4


def test_data_set_workers_serve_until_the_others_have_ended(launcher: Any, client: Any) -> None:
    serving = GRACEFUL.replace("sys.exit(0)", "sys.exit(11)")
    launcher.script(f"[ $SPEC_TYPE != datasetworker ] && exec sleep 1\n{serving}")
    done = launcher("up", "standin", "--datasetworkers", "1", "--evaluator")
    assert done.returncode == 0, done.stderr
    assert "datasetworker-1 | saved" in done.stdout
    launcher.script("[ $SPEC_TYPE = datasetworker ] && exit 6; exec sleep 60\n")
    done = launcher("up", "standin", "--datasetworkers", "1", "--stop-grace", "1")
    assert done.returncode == 6
    assert nothing_is_left(client)


def test_members_find_each_other_by_name_and_have_their_own_environment(launcher: Any) -> None:
    launcher.script(
        "getent hosts chief >/dev/null && getent hosts worker-1 >/dev/null && echo both\n"
        "echo $SPEC_TYPE $(hostname) $PET_NNODES $PET_RDZV_ENDPOINT $PET_RDZV_CONF; sleep 1\n"
    )
    out = launcher("up", "standin").stdout
    assert "chief    | chief 0-chief 2 chief:29500 is_host=true\n" in out
    assert "worker-1 | worker 1-worker 2 chief:29500 is_host=false\n" in out
    assert "| both\n" in out


def test_a_worker_that_is_killed_with_9_is_named(launcher: Any, client: Any, until: Any) -> None:
    launcher.script(GRACEFUL)
    process = launcher.start("up", "standin")
    all_ready(process)
    (worker,) = containers(client, name="worker-1")
    client.kill(worker["Id"], "SIGKILL")
    _, err = process.communicate(timeout=20)
    assert process.returncode == 137
    assert "tml: worker-1 ended with exit code 137: stopping chief" in err
    assert nothing_is_left(client)


def test_a_container_that_somebody_removes_is_named(launcher: Any, client: Any) -> None:
    launcher.script(GRACEFUL)
    process = launcher.start("up", "standin")
    all_ready(process)
    (worker,) = containers(client, name="worker-1")
    client.remove_container(worker["Id"], force=True)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 137
    assert "worker-1" in err.splitlines()[-5:][0] or "worker-1 " in err
    assert nothing_is_left(client)


def test_a_worker_that_is_cut_off_the_network_fails_the_job_at_once(
    launcher: Any, client: Any
) -> None:
    launcher.script(GRACEFUL)
    process = launcher.start("up", "standin", "--workers", "2", "--name", "tml-standin-cut")
    all_ready(process, 2)
    started = time.monotonic()
    client.disconnect_container_from_network("tml-standin-cut-worker-2", "tml-standin-cut")
    out, err = process.communicate(timeout=20)
    assert time.monotonic() - started < 4
    assert process.returncode == 1
    assert "worker-2 was cut off the job's network, tml-standin-cut" in err
    assert out.count("| saved") == 3
    assert nothing_is_left(client)
    assert record(launcher)["exit_code"] == 1


# Signals


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_stops_all_with_grace(
    launcher: Any, client: Any, number: int, status: int
) -> None:
    launcher.script(GRACEFUL)
    process = launcher.start("up", "standin")
    all_ready(process)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == status
    assert out.count("| saved\n") == 2
    # Who was stopped need not be told why it ended.
    assert "exit code" not in err
    assert nothing_is_left(client)
    assert record(launcher)["exit_code"] == status


def test_the_second_signal_kills_all(launcher: Any, client: Any) -> None:
    launcher.script(GRACEFUL)
    process = launcher.start("up", "standin", "--env", "LINGER=60")
    all_ready(process)
    process.send_signal(signal.SIGINT)
    wait_for_lines(process, "chief    | saving", "worker-1 | saving")
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")
    assert time.monotonic() - started < 5
    assert nothing_is_left(client)


def test_a_signal_at_any_early_moment_leaves_nothing(launcher: Any, client: Any) -> None:
    launcher.script("sleep 60\n")
    for delay_s in (0.05, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2):
        process = launcher.start("up", "standin")
        time.sleep(delay_s)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        assert was_interrupted(process.returncode, err), (delay_s, err)
        assert nothing_is_left(client), delay_s


def test_output_that_nobody_reads_any_more_stops_the_job(launcher: Any, client: Any) -> None:
    launcher.script("while true; do echo line; done\n")
    process = launcher.start("up", "standin")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(20) == 128 + signal.SIGPIPE
    assert nothing_is_left(client)


# What goes wrong at the start


def test_a_container_that_cannot_be_made_leaves_nothing(launcher: Any, client: Any) -> None:
    taken = client.create_container("local/torch", name="tml-standin-x-worker-1")["Id"]
    try:
        done = launcher("up", "standin", "--name", "tml-standin-x")
    finally:
        client.remove_container(taken)
    assert done.returncode == 125
    assert "tml-standin-x-worker-1 exists already" in done.stderr
    assert "Traceback" not in done.stderr
    assert nothing_is_left(client)


def test_a_network_that_is_there_is_not_taken_over(launcher: Any, client: Any) -> None:
    client.create_network("tml-standin-x")
    try:
        done = launcher("up", "standin", "--name", "tml-standin-x")
        assert client.networks(names=["tml-standin-x"])
    finally:
        client.remove_network("tml-standin-x")
    assert done.returncode == 125
    assert "a network named tml-standin-x exists already" in done.stderr


def test_a_container_that_cannot_start_ends_those_that_did(launcher: Any, client: Any) -> None:
    launcher.script("sleep 60\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = launcher("up", "standin", "--publish", f"{port}:6006", "--max-restarts", "3")
    assert done.returncode == 125
    assert f"port {port} of this machine is taken" in done.stderr
    assert "attempt" not in done.stderr
    assert nothing_is_left(client)
    assert record(launcher)["exit_code"] == 125


# Restarts


def test_a_failure_starts_all_again_as_often_as_was_asked_for(launcher: Any, client: Any) -> None:
    launcher.script(
        "echo run $SPEC_TYPE; [ $SPEC_TYPE = chief ] && exec sleep 60\n"
        "n=$(cat /root/tmp/n 2>/dev/null || echo 0); echo $((n + 1)) > /root/tmp/n\n"
        "exit $((n + 5))\n"
    )
    done = launcher("up", "standin", "--max-restarts", "2", "--stop-grace", "5")
    assert done.returncode == 7
    assert done.stdout.count("chief    | run chief") == 3
    assert "attempt 1 of 3 failed: worker-1 ended with exit code 5" in done.stderr
    assert "attempt 2 of 3 failed: worker-1 ended with exit code 6" in done.stderr
    assert (record(launcher)["restarts"], record(launcher)["exit_code"]) == (2, 7)
    assert log(launcher, "worker-1").count("tml: attempt") == 2
    assert nothing_is_left(client)


def test_a_restart_that_goes_well_makes_the_job_a_success(launcher: Any) -> None:
    launcher.script("[ -e /root/tmp/again ] && exit 0; sleep 0.5; touch /root/tmp/again; exit 1\n")
    done = launcher("up", "standin", "--workers", "0", "--max-restarts", "5")
    assert done.returncode == 0, done.stderr
    assert "attempt 1 of 6 failed" in done.stderr
    assert record(launcher)["restarts"] == 1


def test_a_job_that_was_told_to_stop_is_not_started_again(launcher: Any, client: Any) -> None:
    launcher.script(GRACEFUL.replace("sys.exit(0)", "sys.exit(3)"))
    process = launcher.start("up", "standin", "--max-restarts", "5")
    all_ready(process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 143
    assert "attempt" not in err
    assert nothing_is_left(client)


def test_a_signal_while_a_failed_attempt_is_stopped_starts_nothing_again(
    launcher: Any, client: Any
) -> None:
    launcher.script(f"[ $SPEC_TYPE = worker ] && {{ sleep 1; exit 9; }}\n{GRACEFUL}")
    process = launcher.start("up", "standin", "--max-restarts", "5", "--env", "LINGER=2")
    wait_for_lines(process, "chief    | saving")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    # The failure came first, so its status is the job's.
    assert process.returncode == 9
    assert "attempt" not in err
    assert nothing_is_left(client)


# In the background


def ended_record(launcher: Any, until: Any) -> Any:
    """The record once the job has ended."""
    until(lambda: record(launcher)["state"] == "ended")
    return record(launcher)


def owner_pid(launcher: Any) -> int:
    """The supervisor's process."""
    return int(record(launcher)["owner"].split(":")[1])


def test_a_detached_gang_goes_on_without_its_launcher(
    launcher: Any, client: Any, until: Any
) -> None:
    launcher.script("echo from $SPEC_TYPE; sleep 2; exit 0\n")
    done = launcher("up", "standin", "--detach", "--name", "tml-standin-bg")
    assert (done.returncode, done.stdout) == (0, "tml-standin-bg\n"), done.stderr
    assert "logs -f tml-standin-bg" in done.stderr
    assert len(containers(client, status="running")) == 2
    assert record(launcher)["state"] == "running"
    found = ended_record(launcher, until)
    assert (found["exit_code"], found["cause"]) == (0, None)
    until(lambda: nothing_is_left(client))
    assert log(launcher, "worker-1") == "from worker\n"
    assert "ended with exit code 0" in log(launcher, "launcher")
    until(lambda: liveness(record(launcher)["owner"]) == "dead")


def test_a_detached_job_that_fails_says_why_in_its_record(
    launcher: Any, client: Any, until: Any
) -> None:
    launcher.script("[ $SPEC_TYPE = worker ] && { echo no; exit 9; }; sleep 60\n")
    assert launcher("up", "standin", "--detach").returncode == 0
    found = ended_record(launcher, until)
    assert found["exit_code"] == 9
    assert found["cause"].startswith("worker-1 ended with exit code 9")
    assert "worker-1 ended with exit code 9" in log(launcher, "launcher")
    until(lambda: nothing_is_left(client))


def test_a_detached_job_stops_with_grace_when_its_supervisor_is_told_to(
    launcher: Any, client: Any, until: Any
) -> None:
    launcher.script(GRACEFUL)
    assert launcher("up", "standin", "--detach").returncode == 0
    until(lambda: "ready" in log(launcher, "chief"))
    os.kill(owner_pid(launcher), signal.SIGTERM)
    assert ended_record(launcher, until)["exit_code"] == 143
    assert log(launcher, "chief") == "ready\nsaving\nsaved\n"
    until(lambda: nothing_is_left(client))


def test_a_detached_job_that_cannot_start_is_the_callers_error(launcher: Any, client: Any) -> None:
    taken = client.create_container("local/torch", name="tml-standin-x-chief")["Id"]
    try:
        done = launcher("up", "standin", "--detach", "--name", "tml-standin-x")
    finally:
        client.remove_container(taken)
    assert (done.returncode, done.stdout) == (125, "")
    assert "tml-standin-x-chief exists already" in done.stderr
    assert nothing_is_left(client)


def test_the_end_of_the_callers_shell_does_not_end_a_detached_job(
    launcher: Any, client: Any, until: Any
) -> None:
    launcher.script("sleep 2; exit 4\n")
    line = " ".join([*launcher.argv, "up", "standin", "--detach"])
    shell = subprocess.Popen(
        ["bash", "-c", f"{line}; sleep 60"],
        env=launcher.env,
        cwd=launcher.home,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert shell.stdout is not None
    assert shell.stdout.readline().startswith("tml-standin-")
    os.killpg(shell.pid, signal.SIGHUP)
    shell.communicate(timeout=10)
    assert ended_record(launcher, until)["exit_code"] == 4
    until(lambda: nothing_is_left(client))


def test_ctrl_c_while_a_detached_job_starts_leaves_nothing(
    launcher: Any, client: Any, until: Any
) -> None:
    launcher.script("sleep 60\n")
    for delay_s in (0.3, 0.5, 0.7, 0.9):
        process = launcher.start("up", "standin", "--detach")
        time.sleep(delay_s)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        if process.returncode == 0:  # It was too late: the job runs.
            os.kill(owner_pid(launcher), signal.SIGTERM)
        else:
            assert was_interrupted(process.returncode, err), (delay_s, err)
            assert out == ""
        until(lambda: nothing_is_left(client))
        for path in records(launcher):
            until(lambda path=path: json.loads(path.read_text())["state"] == "ended")
            path.unlink()


# The engine goes away


class Relay:
    """A socket of ours before the engine's, which can go away as an engine does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.engine = connection.find_endpoint().url.removeprefix("unix://")
        self.connections: list[socket.socket] = []
        self.server: socket.socket | None = None
        self.up()

    def up(self) -> None:
        """Listen."""
        self.path.unlink(missing_ok=True)
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(self.path))
        self.server.listen(64)
        threading.Thread(target=self._accept, args=[self.server], daemon=True).start()

    def down(self) -> None:
        """Refuse, and cut every connection."""
        assert self.server is not None
        with suppress(OSError):  # it may be down already
            self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
        self.path.unlink(missing_ok=True)
        for end in self.connections:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self.connections.clear()

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                ours, _ = server.accept()
            except OSError:
                return
            theirs = socket.socket(socket.AF_UNIX)
            theirs.connect(self.engine)
            self.connections += [ours, theirs]
            for pair in ((ours, theirs), (theirs, ours)):
                threading.Thread(target=self._copy, args=pair, daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@contextmanager
def relayed(launcher: Any, tmp_path: Path) -> Iterator[Relay]:
    """The launcher speaks to the engine through a relay."""
    relay = Relay(tmp_path / "relay.sock")
    launcher.env["DOCKER_HOST"] = f"unix://{relay.path}"
    try:
        yield relay
    finally:
        relay.down()


def test_containers_that_outlive_a_break_are_followed_again(
    launcher: Any, client: Any, tmp_path: Path, until: Any
) -> None:
    launcher.script("echo ready; until [ -e /root/tmp/go ]; do sleep 0.1; done; echo end; exit 3\n")
    with relayed(launcher, tmp_path) as relay:
        process = launcher.start("up", "standin")
        all_ready(process)
        time.sleep(1)  # They may speak before the engine has answered that they are started.
        relay.down()
        assert "lost the Docker Engine" in [process.stderr.readline() for _ in range(3)][-1]
        time.sleep(1)
        relay.up()
        assert "the Docker Engine is back" in process.stderr.readline()
        (launcher.home / "tmp" / "go").touch()
        out, err = process.communicate(timeout=30)
        assert process.returncode == 3, err
        assert "| end" in out
        assert nothing_is_left(client)


def test_containers_that_ended_with_the_engine_are_a_failure_that_says_so(
    launcher: Any, client: Any, tmp_path: Path, until: Any
) -> None:
    launcher.script(GRACEFUL)
    with relayed(launcher, tmp_path) as relay:
        process = launcher.start("up", "standin", "--max-restarts", "1")
        all_ready(process)
        time.sleep(1)  # They may speak before the engine has answered that they are started.
        relay.down()
        for found in containers(client):
            client.stop(found["Id"], timeout=5)
        relay.up()
        all_ready(process)
        time.sleep(1)  # They may speak before the engine has answered that they are started.
        relay.down()
        for found in containers(client):
            client.stop(found["Id"], timeout=5)
        relay.up()
        _, err = process.communicate(timeout=30)
        assert process.returncode == 125, err
        assert "attempt 1 of 2 failed: the Docker Engine was stopped while the job ran" in err
        assert nothing_is_left(client)
        assert record(launcher)["cause"] == "the Docker Engine was stopped while the job ran"


def test_a_run_whose_engine_went_away_is_removed_once_it_is_back(
    launcher: Any, client: Any, tmp_path: Path, until: Any
) -> None:
    launcher.script(GRACEFUL)
    with relayed(launcher, tmp_path) as relay:
        process = launcher.start("run", "standin")
        assert process.stdout.readline() == "ready\n"
        relay.down()
        time.sleep(1)
        relay.up()
        _, err = process.communicate(timeout=30)
        assert process.returncode == 125
        assert "the Docker Engine was stopped, or cut off, while tml-standin" in err
        assert nothing_is_left(client)
        assert record(launcher)["exit_code"] == 125


def test_an_engine_that_does_not_come_back_is_given_up_at_the_second_signal(
    launcher: Any, client: Any, tmp_path: Path
) -> None:
    launcher.script(GRACEFUL)
    with relayed(launcher, tmp_path) as relay:
        process = launcher.start("up", "standin")
        all_ready(process)
        time.sleep(1)  # They may speak before the engine has answered that they are started.
        relay.down()
        assert "lost the Docker Engine" in [process.stderr.readline() for _ in range(3)][-1]
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.6)
        _, err = process.communicate(timeout=10)
        assert process.returncode == 125
        assert "may be left. Once it is back: python -m tml.docker gc" in err
        relay.up()
    for found in containers(client):
        client.remove_container(found["Id"], force=True)
    for network in networks(client):
        client.remove_network(network["Id"])
