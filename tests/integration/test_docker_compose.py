"""docker-compose.yml and the plan describe the same container."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.docker

REPOSITORY = Path(__file__).resolve().parents[2]


def test_compose_and_plan_agree(launcher: Any) -> None:
    launcher.base = REPOSITORY
    launcher.env |= {"TML_BASE": str(REPOSITORY), "USER": "root", "LOGNAME": "root"}
    launcher.env["TML_USER"] = f"{os.getuid()}:{os.getgid()}"
    plan = json.loads(launcher("run", "twhin", "--json").stdout)
    done = subprocess.run(
        ["docker", "compose", "config", "--format", "json"],
        cwd=REPOSITORY,
        env=launcher.env,
        capture_output=True,
        text=True,
        check=True,
    )
    chief = json.loads(done.stdout)["services"]["chief"]
    assert chief["image"] == plan["image"]
    assert chief["command"] == plan["command"]
    assert chief["working_dir"] == plan["workdir"]
    assert chief["user"] == plan["user"]
    assert chief["environment"] == {v["name"]: v["value"] for v in plan["env"]}
    assert [
        {"source": m["source"], "target": m["target"], "read_only": m.get("read_only", False)}
        for m in chief["volumes"]
    ] == plan["mounts"]
    assert chief["network_mode"] == plan["network"]
    assert chief["init"] is True
    assert int(chief["shm_size"]) == plan["shm_bytes"]
    assert chief["stop_grace_period"] == f"{plan['stop_grace_s']}s"
    assert chief["cap_drop"] == ["ALL"]
    assert chief["security_opt"] == ["no-new-privileges"]
    assert chief["pids_limit"] == 8192
