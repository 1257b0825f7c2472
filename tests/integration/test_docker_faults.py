"""What goes wrong while a job of several containers trains for real: in each case the right exit
code, nothing left behind, a last complete checkpoint that loads, a message that names the cause.

TML_FAULT_REPEATS repeats each case; timing decides what meets what.
"""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.stand_in import STAND_IN, containers, networks
from tml import checkpoint
from tml.machines import environment

pytestmark = [pytest.mark.docker, pytest.mark.slow]

REPOSITORY = Path(__file__).resolve().parents[2]
REPEATS = range(int(os.environ.get(environment.TML_FAULT_REPEATS, "1")))
SCRIPT = """\
cd /usr/src/app/tml
exec python -m tml.torchrun projects/twhin/run.py --config_yaml_path=/root/tmp/faults.yaml \
  --save_dir=/root/tmp/runs/standin "$@"
"""
CONFIG = """\
training:
  {num_epochs: 10000, checkpoint_every_n: 4, checkpoint_max_to_keep: 3, train_log_every_n: 1}
planted: {num_users: 60, num_tweets: 50, num_communities: 5, edges_per_user: {fav: 8.0}}
model:
  init_scale: 0.01
  loss: {softmax: {temperature: 1.0}}
  translation_optimizer: {adagrad: {lr: 0.1}}
  embeddings:
    defaults: {embedding_dim: 16, data_type: fp32, optimizer: {rowwise_adagrad: {lr: 0.05}}}
    tables: [{name: user, num_embeddings: 60}, {name: tweet, num_embeddings: 50}]
  relations: [{name: fav, lhs: user, rhs: tweet, operator: translation}]
train_data:
  data_root: /root/tmp/planted/train/*.parquet
  per_replica_batch_size: 16
  global_negatives: 4
  chunk_size: 8
"""


class Job:
    """`up` of one chief and one worker that train until something happens."""

    def __init__(self, launcher: Any, client: Any) -> None:
        self.launcher, self.client = launcher, client
        self.save_dir = launcher.home / "tmp" / "runs" / "standin"
        self.process: subprocess.Popen[str] | None = None

    def prepare(self) -> None:
        """A checkout that can train, and a small graph that takes for ever."""
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(
            REPOSITORY / "tml", self.launcher.base / "tml", ignore=ignored, dirs_exist_ok=True
        )
        projects = self.launcher.base / "projects"
        projects.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / "projects" / "__init__.py", projects)
        shutil.copytree(REPOSITORY / "projects" / "twhin", projects / "twhin", ignore=ignored)
        self.launcher.script(SCRIPT)
        (self.launcher.home / "tmp").mkdir()
        (self.launcher.home / "tmp" / "faults.yaml").write_text(CONFIG)

    def start(self, *flags: str) -> None:
        """Start, and leave the job running."""
        self.process = self.launcher.start("up", "standin", *flags)

    def train(self, *flags: str, steps: int = 1) -> None:
        """Start, and come back when it has saved `steps` checkpoints."""
        self.start(*flags)
        self.until(lambda: len(checkpoint.complete_steps(self.save_dir)) >= steps)

    def until(self, condition: Any, timeout_s: float = 180.0) -> None:
        """Wait for `condition`, while the launcher lives."""
        assert self.process is not None
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline, "not so in time"
            time.sleep(0.002)

    def container(self, member: str) -> str:
        """Id of a member's container."""
        role, _, index = member.partition("-")
        labels = [
            f"tml.project={STAND_IN}",
            f"tml.role={role}",
            f"tml.index={index or 0}",
        ]
        found = self.client.containers(filters={"label": labels})
        assert len(found) == 1, found
        return str(found[0]["Id"])

    def end(self, timeout_s: float = 120.0) -> tuple[int, str]:
        """(exit code, stderr) of the launcher."""
        assert self.process is not None
        _, err = self.process.communicate(timeout=timeout_s)
        assert "Traceback" not in err.rpartition("tml: ")[2]
        return self.process.returncode, err

    def check_nothing_left(self) -> None:
        """No container, no network, and a checkpoint that loads."""
        assert left(self.client) == []
        steps = checkpoint.complete_steps(self.save_dir)
        assert steps
        loaded = checkpoint.load_whole(self.save_dir / str(steps[-1]))
        assert loaded["tables.user.weight"].shape == (60, 16)
        assert loaded["tables.user.weight"].isfinite().all()
        meta = checkpoint.load_meta(self.save_dir / str(steps[-1]))
        assert meta["step"] == steps[-1]


def left(client: Any) -> list[str]:
    """Names of what jobs of the stand-in project left."""
    found = [str(container["Names"]) for container in containers(client)]
    return found + [str(network["Name"]) for network in networks(client)]


@pytest.fixture
def job(launcher: Any, client: Any) -> Iterator[Job]:
    """A job that is ready to be started; volumes are as before afterwards."""
    before = {volume["Name"] for volume in client.volumes()["Volumes"] or ()}
    made = Job(launcher, client)
    made.prepare()
    yield made
    if made.process is not None and made.process.poll() is None:
        made.process.terminate()
        made.process.communicate(timeout=90)
    assert {volume["Name"] for volume in client.volumes()["Volumes"] or ()} == before


@pytest.mark.parametrize("repeat", REPEATS)
@pytest.mark.parametrize("member", ["worker-1", "chief"])
def test_a_container_killed_with_9(job: Job, member: str, repeat: int) -> None:
    job.train()
    job.client.kill(job.container(member), "SIGKILL")
    code, err = job.end()
    assert code == 137, err
    assert f"{member} was killed" in err
    assert "SIGKILL" in err
    job.check_nothing_left()


@pytest.mark.parametrize("repeat", REPEATS)
@pytest.mark.parametrize("member", ["worker-1", "chief"])
def test_a_process_of_a_container_killed_with_9(job: Job, member: str, repeat: int) -> None:
    job.train()
    processes = job.client.top(job.container(member), "-eo pid,args")["Processes"]
    trainers = [
        int(pid) for pid, args in processes if "run.py" in args and "tml.torchrun" not in args
    ]
    assert trainers, processes
    os.kill(trainers[-1], signal.SIGKILL)
    code, err = job.end()
    assert code == 137, err
    assert member in err
    job.check_nothing_left()


@pytest.mark.parametrize("repeat", REPEATS)
def test_a_worker_that_is_cut_off_the_network(job: Job, repeat: int) -> None:
    job.train()
    (network,) = networks(job.client)
    job.client.disconnect_container_from_network(job.container("worker-1"), network["Id"])
    code, err = job.end()
    assert code not in (0, 125), err
    assert "worker-1" in err
    assert "network" in err
    job.check_nothing_left()


@pytest.mark.parametrize("repeat", REPEATS)
def test_the_driver_killed_with_9_and_then_gc(job: Job, repeat: int) -> None:
    job.train()
    assert job.process is not None
    job.process.kill()
    job.process.communicate(timeout=20)
    assert len(left(job.client)) == 3  # two containers, one network
    done = job.launcher("gc")
    assert done.returncode == 0, done.stderr
    job.check_nothing_left()


MOMENTS = ("start", "middle", "checkpoint")


def interrupt(job: Job, moment: str, repeat: int) -> None:
    """Send SIGINT, as Ctrl-C does, at that moment."""
    assert job.process is not None
    if moment == "start":
        time.sleep(0.35 + 0.17 * repeat)
    elif moment == "checkpoint":
        job.until(lambda: any(unfinished(job.save_dir)))
    job.process.send_signal(signal.SIGINT)


def unfinished(save_dir: Path) -> Iterator[Path]:
    """Step folders that are being written."""
    for folder in save_dir.iterdir() if save_dir.is_dir() else ():
        if folder.name.isdigit() and not (folder / checkpoint.COMPLETE).exists():
            yield folder


@pytest.mark.parametrize("repeat", REPEATS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_once(job: Job, moment: str, repeat: int) -> None:
    job.train() if moment != "start" else job.start()
    interrupt(job, moment, repeat)
    before = checkpoint.complete_steps(job.save_dir) if moment != "start" else []
    code, err = job.end()
    assert code == 130, err
    assert left(job.client) == []
    if moment != "start":
        job.check_nothing_left()
        # It was told to stop and had the time: what it had learned since is saved.
        assert checkpoint.complete_steps(job.save_dir)[-1] > before[-1]


@pytest.mark.parametrize("repeat", REPEATS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_twice(job: Job, moment: str, repeat: int) -> None:
    job.train() if moment != "start" else job.start()
    interrupt(job, moment, repeat)
    time.sleep(0.1)
    assert job.process is not None
    job.process.send_signal(signal.SIGINT)
    started = time.monotonic()
    code, err = job.end()
    assert code == 130, err
    assert time.monotonic() - started < 15
    assert left(job.client) == []
    if moment != "start":
        job.check_nothing_left()


@pytest.mark.parametrize("repeat", REPEATS)
def test_memory_that_runs_out(job: Job, repeat: int) -> None:
    job.train()
    assert job.process is not None
    job.process.send_signal(signal.SIGTERM)
    assert job.end()[0] == 143
    job.start("--memory", "150m")  # less than torch itself takes
    code, err = job.end()
    assert code == 137, err
    assert "out of memory" in err
    assert "150" in err
    job.check_nothing_left()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a small disk")
@pytest.mark.parametrize("repeat", REPEATS)
def test_a_full_disk_in_the_run_folder(job: Job, repeat: int) -> None:
    disk = job.launcher.home / "disk"
    disk.mkdir()
    size = ["-o", "size=1m"]
    subprocess.run(["mount", "-t", "tmpfs", *size, "tmpfs", str(disk)], check=True)
    try:
        job.save_dir = disk / "run"
        flags = ["--mount", f"{disk}:/small", "--", "--save_dir=/small/run"]
        keep = ["--set", "training.checkpoint_max_to_keep=1000"]
        job.start(*flags, *keep)
        code, err = job.end(90)
        assert code == 2, err
        assert "no space left on device" in err
        assert "/small/run" in err
        job.check_nothing_left()
        assert not list(unfinished(job.save_dir))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("repeat", REPEATS)
def test_after_a_failure_the_gang_goes_on_from_the_last_checkpoint(job: Job, repeat: int) -> None:
    job.train("--max-restarts", "1", steps=2)
    reached = checkpoint.complete_steps(job.save_dir)[-1]
    job.client.kill(job.container("worker-1"), "SIGKILL")
    job.until(lambda: checkpoint.complete_steps(job.save_dir)[-1] > reached + 8)
    assert job.process is not None
    job.process.send_signal(signal.SIGTERM)
    code, err = job.end()
    assert code == 143, err
    records = [json.loads(line) for line in (job.save_dir / "metrics.jsonl").open()]
    steps = [record["step"] for record in records if record.get("kind", "train") == "train"]
    assert steps == list(range(1, steps[-1] + 1))
    job.check_nothing_left()


# The engine itself goes away: one of our own, so that the others' jobs live


class OwnEngine:
    """A second Docker Engine with an image of a shell and nothing else, called local/torch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"unix://{folder}/docker.sock"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        # With network interfaces of its own: --bridge=none deletes docker0, whosever it is.
        argv = ["unshare", "--net", "dockerd", "--bridge=none", "--iptables=false"]
        argv += ["--host", self.url, "--data-root", f"{self.folder}/data"]
        argv += ["--exec-root", f"{self.folder}/exec", "--pidfile", f"{self.folder}/pid"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while self.docker("version").returncode:
            assert time.monotonic() < deadline, (self.folder / "log").read_text()[-2000:]
            time.sleep(0.1)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Stop it, and with it its containers; killed with -9 it leaves them running."""
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(60)

    def docker(self, *argv: str, **more: Any) -> subprocess.CompletedProcess[str]:
        """The command line, speaking to this engine."""
        return subprocess.run(
            ["docker", "-H", self.url, *argv], capture_output=True, text=True, check=False, **more
        )

    def import_shell(self) -> None:
        """local/torch: bash, sleep and what they need of this machine."""
        root = self.folder / "root"
        wanted = [shutil.which(name) for name in ("bash", "sleep", "touch", "cat")]
        for program in wanted:
            assert program is not None
            real = Path(program).resolve()
            libraries = subprocess.run(["ldd", real], capture_output=True, text=True, check=True)
            found = [word for word in libraries.stdout.split() if word.startswith("/")]
            for path in [str(real), *found]:
                target = root / path.lstrip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
        (root / "bin").mkdir(exist_ok=True)
        archive = shutil.make_archive(str(self.folder / "shell"), "tar", root)
        path = "ENV PATH=/usr/bin:/bin"
        done = self.docker("import", "-c", path, archive, "local/torch")
        assert done.returncode == 0, done.stderr

    def left(self) -> str:
        """Containers and networks of the launcher."""
        containers = self.docker("ps", "-aq", "--filter", "label=tml.run").stdout
        return containers + self.docker("network", "ls", "-q", "--filter", "label=tml.run").stdout


@pytest.fixture
def own_engine(bare_launcher: Any) -> Iterator[OwnEngine]:
    """An engine that may be stopped; the launcher speaks to it."""
    if shutil.which("dockerd") is None or os.getuid() != 0:
        pytest.skip("needs root and dockerd, to start an engine of its own")
    # Short, since the path of a socket may not be long; and on a disk that overlays can lie on.
    folder = Path(tempfile.mkdtemp(prefix="tml-engine-", dir="/var/tmp"))
    engine = OwnEngine(folder)
    engine.start()
    try:
        engine.import_shell()
        bare_launcher.env["DOCKER_HOST"] = engine.url
        yield engine
        assert engine.left() == ""
    finally:
        for container in engine.docker("ps", "-aq").stdout.split():
            engine.docker("rm", "-f", container)
        engine.stop()
        shutil.rmtree(folder, ignore_errors=True)


FOR_EVER = "echo ready; trap 'exit 0' TERM; while true; do sleep 0.1; done\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_engine_stopped_and_started_while_a_job_is_detached(
    bare_launcher: Any, own_engine: OwnEngine, number: int
) -> None:
    bare_launcher.script(FOR_EVER)
    up = bare_launcher("up", "standin", "--detach", "--no-build")
    assert up.returncode == 0, up.stderr
    name = up.stdout.strip()
    own_engine.stop(number)
    time.sleep(1)
    own_engine.start()
    waited = bare_launcher("wait", name, "--json")
    told = json.loads(waited.stdout)
    assert waited.returncode == told["exit_code"] != 0
    assert "Engine was stopped" in told["cause"]
    assert own_engine.left() == ""


def test_the_engine_restarted_and_the_gang_with_it(
    bare_launcher: Any, own_engine: OwnEngine, until: Any
) -> None:
    bare_launcher.script("cd /root/tmp; if [ -e again ]; then exit 0; fi; touch begun\n" + FOR_EVER)
    up = bare_launcher("up", "standin", "--detach", "--no-build", "--max-restarts", "1")
    assert up.returncode == 0, up.stderr
    until(lambda: (bare_launcher.home / "tmp" / "begun").exists())
    (bare_launcher.home / "tmp" / "again").touch()
    own_engine.stop()
    own_engine.start()
    assert bare_launcher("wait", up.stdout.strip()).returncode == 0
    assert own_engine.left() == ""
