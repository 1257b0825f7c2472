"""docker compose: the same containers as the launcher's plan, and the same training."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tml import checkpoint
from tml.docker.plan import PIDS_LIMIT
from tml.logs import read_records

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(1200)]

REPOSITORY = Path(__file__).resolve().parents[2]
ALL = ("datasetworker", "evaluator", "tensorboard")
TRAINERS = ("chief", "worker")

BY_DESIGN = {
    "TML_WORKERS": "Compose has no arithmetic: torchrun adds the chief to this",
    "PET_NNODES": "torchrun computes it from TML_WORKERS",
    "PET_RDZV_ID": "a job's id there; a project has one job at a time, in its own network",
    "PET_NPROC_PER_NODE": "always said: a variable of Compose has a default",
    "TML_DATASETWORKERS": "always said, empty for none; the name of the service",
}
"""Variables that differ between the two, and why. Further: the hostname (the number of workers is
not known to the file), /data (always mounted: a file has no "if"), and DAC_OVERRIDE (always given
to root, since a file cannot look at whose the folders are).
"""
SMALL = ["--set", "training.num_epochs=1", "--set", "train_data.limit=60000"]


class Compose:
    """`docker compose` on this checkout, as a project of its own with a home of its own."""

    def __init__(self, home: Path, name: str) -> None:
        self.home, self.name = home, name
        self.env = {n: v for n, v in os.environ.items() if not n.startswith(("TML_", "COMPOSE_"))}
        self.env |= {"HOME": str(home), "TML_USER": f"{os.getuid()}:{os.getgid()}"}

    def start(self, *argv: str, **env: str) -> "subprocess.Popen[str]":
        """Start; the home keeps a .env of the checkout out of it."""
        (self.home / "none.env").touch()
        command = ["docker", "compose", "-p", self.name, "--env-file", str(self.home / "none.env")]
        return subprocess.Popen(
            [*command, *argv],
            cwd=REPOSITORY,
            env={**self.env, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __call__(self, *argv: str, timeout_s: float = 600, **env: str) -> tuple[int, str]:
        """Exit status and output."""
        process = self.start(*argv, **env)
        output, _ = process.communicate(timeout=timeout_s)
        return process.returncode, output

    def exit_codes(self) -> dict[str, int]:
        """By container, without the project's name."""
        _, output = self("ps", "-a", "--format", "json")
        rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        assert all(row["State"] == "exited" for row in rows), rows
        return {row["Name"].removeprefix(f"{self.name}-"): row["ExitCode"] for row in rows}


@pytest.fixture
def compose(tmp_path: Path, image: str) -> Iterator[Compose]:
    """A project of which nothing is left afterwards."""
    compose = Compose(tmp_path, f"tmltest{os.getpid()}")
    for folder in (".config", "tmp"):
        (tmp_path / folder).mkdir()
    yield compose
    code, output = compose("--profile", "*", "down", "-t", "0", "-v")
    assert code == 0, output
    label = f"label=com.docker.compose.project={compose.name}"
    for what in (["ps", "-aq"], ["network", "ls", "-q"], ["volume", "ls", "-q"]):
        listed = subprocess.run(
            ["docker", *what, "--filter", label], capture_output=True, text=True, check=True
        )
        assert listed.stdout == "", what


def configured(env_file: Path, home: Path) -> dict[str, Any]:
    """Services as Compose understands them."""
    done = subprocess.run(
        ["docker", "compose", "--env-file", str(env_file), "config", "--format", "json"],
        cwd=REPOSITORY,
        env={n: v for n, v in os.environ.items() if not n.startswith("TML_")} | {"HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    services: dict[str, Any] = json.loads(done.stdout)["services"]
    return services


@pytest.mark.parametrize(
    ("flags", "args"),
    [
        (["--workers=1"], []),
        (
            ["--workers=3", "--shm-size=1g", "--memory=3g", "--cpus=1.5", "--nproc-per-node=2"],
            ["--set", "a=it's $HOME", "--save_dir=/root/tmp/runs/x"],
        ),
    ],
)
def test_compose_and_plan_agree(
    bare_launcher: Any, tmp_path: Path, flags: list[str], args: list[str]
) -> None:
    launcher, file = bare_launcher, tmp_path / "env"
    launcher.base = REPOSITORY
    launcher.env["TML_BASE"] = str(REPOSITORY)
    flags = [*flags, f"--data={tmp_path}"]
    profiles = [f"--profile={name}" for name in ALL]
    written = launcher("compose-env", *flags, *profiles, f"--output={file}", "--", *args)
    assert written.returncode == 0, written.stderr
    others = ["--datasetworkers=1", "--evaluator"]
    gang = json.loads(launcher("up", "twhin", *flags, *others, "--json", "--", *args).stdout)
    services = configured(file, launcher.home)
    assert set(services) == {*TRAINERS, *ALL}
    planned = {member["role"]: member for member in gang["members"]}
    assert set(planned) == set(services) - {"tensorboard"}
    for role, plan in planned.items():
        _agree(services[role], plan)
    assert services["worker"]["deploy"]["replicas"] == sum(
        member["role"] == "worker" for member in gang["members"]
    )
    assert services["chief"]["hostname"].endswith("-chief")
    assert "container_name" not in services["worker"]
    assert 'host_ip": "127.0.0.1' in json.dumps(services["tensorboard"]["ports"])


def _agree(service: dict[str, Any], plan: dict[str, Any]) -> None:
    assert service["image"] == plan["image"]
    # In what `config` prints a dollar stands twice.
    assert [word.replace("$$", "$") for word in service["command"]] == plan["command"]
    assert service["working_dir"] == plan["workdir"]
    assert service["user"] == plan["user"]
    ours = {name: value for name, value in service["environment"].items() if name not in BY_DESIGN}
    theirs = {v["name"]: v["value"] for v in plan["env"] if v["name"] not in BY_DESIGN}
    assert ours == theirs
    assert [
        {"source": m["source"], "target": m["target"], "read_only": m.get("read_only", False)}
        for m in service["volumes"]
    ] == plan["mounts"]
    assert service["init"] is True
    assert service["restart"] == "no"
    assert int(service["shm_size"]) == plan["shm_bytes"]
    assert int(service.get("mem_limit", 0)) == (plan["memory_bytes"] or 0)
    assert float(service.get("cpus", 0)) == (plan["cpus"] or 0)
    assert service["stop_grace_period"] == f"{plan['stop_grace_s']}s"
    assert (service["cap_drop"], service["cap_add"]) == (["ALL"], ["DAC_OVERRIDE"])
    assert service["security_opt"] == ["no-new-privileges"]
    assert service["pids_limit"] == PIDS_LIMIT
    assert "network_mode" not in service
    assert plan["gpus"] is None


def test_without_env_the_plan_of_the_defaults_is_started(tmp_path: Path) -> None:
    (tmp_path / "none").touch()
    services = configured(tmp_path / "none", tmp_path)
    assert set(services) == set(TRAINERS)
    chief = services["chief"]
    assert chief["command"] == ["bash", "tml/projects/twhin/scripts/run_in_docker.sh"]
    assert (chief["user"], chief["environment"]["TML_WORKERS"]) == ("0:0", "1")
    sources = [volume["source"] for volume in chief["volumes"]]
    home = str(tmp_path)
    assert sources == [str(REPOSITORY), f"{home}/.config", f"{home}/tmp", f"{home}/tmp"]
    assert all(volume["bind"]["create_host_path"] for volume in chief["volumes"][1:])


def test_the_override_for_gpus_asks_for_all_of_them() -> None:
    done = subprocess.run(
        ["docker", "compose", "-f", "docker-compose.yml", "-f", "docker-compose.gpu.yml"]
        + ["config", "--format", "json"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    services = json.loads(done.stdout)["services"]
    for role in TRAINERS:
        assert services[role]["image"] == "local/torch:gpu"
        (device,) = services[role]["deploy"]["resources"]["reservations"]["devices"]
        assert (device["count"], device["capabilities"]) == (-1, ["gpu"])
    assert services["chief"]["build"]["args"] == {"VARIANT": "gpu"}


def metrics(run: Path) -> list[dict[str, Any]]:
    """Records less what depends on the clock."""
    timed = {"time", "rate", "memory_bytes", "left_s"}
    return [
        {key: value for key, value in record.items() if key not in timed}
        for record in read_records(run / "metrics.jsonl")
    ]


def test_two_containers_train_as_two_processes_of_one_do(compose: Compose, tmp_path: Path) -> None:
    code, output = compose("up", TML_ARGS=shlex.join([*SMALL, "--save_dir=/root/tmp/runs/two"]))
    assert code == 0, output
    assert compose.exit_codes() == {"chief-1": 0, "worker-1": 0}
    # The chief alone speaks, and is rank 0.
    assert "chief-1" in output
    assert "2 processes on cpu" in output
    single = subprocess.run(
        [sys.executable, "-m", "tml.docker", "run", "--nproc-per-node=2", "--"]
        + [*SMALL, "--save_dir=/root/tmp/runs/one"],
        cwd=REPOSITORY,
        env={**os.environ, "HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert single.returncode == 0, single.stderr
    runs = tmp_path / "tmp" / "runs"
    assert metrics(runs / "two") == metrics(runs / "one")
    assert len(metrics(runs / "two")) >= 2


def test_the_chief_is_rank_0_whoever_comes_first(compose: Compose, tmp_path: Path) -> None:
    say = "echo $SPEC_TYPE is rank $RANK of $WORLD_SIZE"
    (tmp_path / "tmp" / "say.sh").write_text(
        "[[ $SPEC_TYPE == worker ]] || sleep 0.$RANDOM\n"
        f"exec python -m tml.torchrun --no-python bash -c '{say}'\n"
    )
    for _ in range(5):
        # From /usr/src/app/tml.
        script = {"TML_SCRIPT": "../../../../root/tmp/say.sh", "TML_WORKERS": "2"}
        code, output = compose("up", **script)
        said = sorted(re.findall(r"\w+ is rank \d of \d", output))
        ranks = ["chief is rank 0 of 3", "worker is rank 1 of 3", "worker is rank 2 of 3"]
        assert (code, said) == (0, ranks), output
        assert set(compose.exit_codes().values()) == {0}


def test_a_scale_that_disagrees_is_refused(compose: Compose) -> None:
    code, output = compose("up", "--scale", "worker=3", TML_ARGS=shlex.join(SMALL))
    assert "workers have joined a job of 1; TML_WORKERS says how many there should be" in output
    assert compose.exit_codes() == dict.fromkeys(
        ["chief-1", "worker-1", "worker-2", "worker-3"], 2
    ), (code, output)


def test_workers_that_are_missing_end_the_job(compose: Compose) -> None:
    _, output = compose("up", "--scale", "worker=1", TML_WORKERS="2", TML_ARGS=shlex.join(SMALL))
    assert "waiting for workers: 1 of 2 joined after 30 s" in output
    assert "error: 1 of 2 workers joined after 60 s" in output
    assert compose.exit_codes() == {"chief-1": 2, "worker-1": 2}


def test_stopped_with_grace_it_leaves_a_checkpoint_and_its_exit_status(
    compose: Compose, tmp_path: Path
) -> None:
    run = tmp_path / "tmp" / "runs" / "twhin"
    args = shlex.join(["--set", "training.train_log_every_n=1"])
    assert compose("up", "-d", TML_ARGS=args)[0] == 0
    deadline = time.monotonic() + 300
    while not (run / "metrics.jsonl").exists() or not read_records(run / "metrics.jsonl"):
        assert time.monotonic() < deadline, compose("logs")[1]
        time.sleep(0.2)
    waiting = compose.start("wait", "chief")
    time.sleep(1.0)
    started = time.monotonic()
    assert compose("stop")[0] == 0
    assert time.monotonic() - started < 45
    assert waiting.communicate(timeout=60)[0].split()[-1] == "143"
    assert set(compose.exit_codes().values()) == {143}
    (step,) = checkpoint.complete_steps(run)
    assert checkpoint.load_meta(run / str(step))["world_size"] == 2
