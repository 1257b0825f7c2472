"""The plan: from a request to one container, without an engine."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tml.docker import plan as plans
from tml.docker import render
from tml.docker.checkout import Project
from tml.docker.errors import UsageError
from tml.docker.plan import Gpus, Host, Mount, Plan, Port, Request

TWHIN = Project(path="twhin", script="projects/twhin/scripts/run_in_docker.sh")
HOST = Host(
    checkout=Path("/home/me/tml"),
    home=Path("/home/me"),
    cwd=Path("/home/me/projects"),
    uid=1000,
    gid=1001,
    user="me",
    environment={"TOKEN": "planted", "SHARED": "x", "BASH_ENV": "/x"},
    terminal=False,
)


def plan(host: Host = HOST, **request: Any) -> Plan:
    """A plan of a run of twhin."""
    return plans.plan_run(Request(**request), host, TWHIN, "1234")


def environment(made: Plan) -> dict[str, str]:
    """The container's variables."""
    return {variable.name: variable.value for variable in made.env}


def test_the_default_plan_is_the_contract() -> None:
    made = plan()
    assert made.image == "local/torch"
    assert made.command == ("bash", "tml/projects/twhin/scripts/run_in_docker.sh")
    assert made.mounts == (
        Mount(source="/home/me/tml", target="/usr/src/app/tml"),
        Mount(source="/home/me/.config", target="/root/.config", read_only=True),
        Mount(source="/home/me/tmp", target="/root/tmp"),
    )
    assert made.workdir == "/usr/src/app"
    assert environment(made) == {
        "PYTHONPATH": "/usr/src/app/",
        "SPEC_TYPE": "chief",
        "HOME": "/root",
        "USER": "me",
        "LOGNAME": "me",
        "TORCHINDUCTOR_CACHE_DIR": "/tmp/torchinductor",
    }
    assert (made.network, made.user, made.cap_add) == ("host", "1000:1001", ())
    assert (made.shm_bytes, made.stop_grace_s) == (2 << 30, 45)
    assert (made.tty, made.interactive, made.detach) == (False, False, False)


def test_the_whole_line_of_the_default_plan() -> None:
    assert render.to_shell(plan()) == (
        "docker run --rm --init --name tml-twhin-1234"
        " --mount type=bind,source=/home/me/tml,target=/usr/src/app/tml"
        " --mount type=bind,source=/home/me/.config,target=/root/.config,readonly"
        " --mount type=bind,source=/home/me/tmp,target=/root/tmp"
        " -w /usr/src/app --user 1000:1001 -e PYTHONPATH=/usr/src/app/ -e SPEC_TYPE=chief"
        " -e HOME=/root -e USER=me -e LOGNAME=me -e TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor"
        " --network host --shm-size 2g --cap-drop ALL --security-opt no-new-privileges"
        " --pids-limit 8192 --stop-timeout 45 --label tml.run=1234"
        " --label tml.job=tml-twhin-1234 --label tml.user=me --label tml.role=chief"
        " --label tml.index=0"
        " --label tml.project=twhin local/torch bash tml/projects/twhin/scripts/run_in_docker.sh"
    )


def test_planning_twice_gives_the_same_plan() -> None:
    request = {"env": ("TOKEN", "A=1"), "memory": "4g", "args": ("--set", "a=b")}
    assert plan(**request) == plan(**request)
    assert render.to_shell(plan(**request)) == render.to_shell(plan(**request))


def test_a_terminal_makes_it_interactive_unless_it_is_detached() -> None:
    terminal = replace(HOST, terminal=True)
    assert " -it " in render.to_shell(plan(terminal))
    sent = render.to_engine(plan(terminal), "owner")
    assert (sent["Tty"], sent["OpenStdin"], sent["AttachStdin"]) == (True, True, True)
    detached = render.to_shell(plan(terminal, detach=True))
    assert " -d " in detached
    assert " -it " not in detached


def test_arguments_follow_the_command_and_are_quoted_in_the_line() -> None:
    made = plan(args=("--set", "a=it's $HOME"))
    assert made.command[2:] == ("--set", "a=it's $HOME")
    assert shlex.split(render.to_shell(made))[-2:] == ["--set", "a=it's $HOME"]


def test_a_variable_by_name_is_passed_on_and_never_shown() -> None:
    made = plan(env=("TOKEN", "SHARED", "ABSENT"))
    assert environment(made)["TOKEN"] == "planted"
    assert "ABSENT" not in environment(made)
    line = render.to_shell(made)
    assert "-e TOKEN -e SHARED --network" in line
    assert "planted" not in line
    assert "planted" not in str(render.to_json(made))
    assert "planted" not in str(render.to_engine(made, "owner", Path("/dev/shm/x/tml.env")))


@pytest.mark.parametrize("name", ["HF_TOKEN", "apiKey", "DB_PASSWORD", "aws_secret_access_key"])
def test_a_value_given_to_a_name_that_looks_secret_is_masked(name: str) -> None:
    made = plan(env=(f"{name}=planted",))
    assert environment(made)[name] == "planted"
    assert "planted" not in render.to_shell(made) + str(render.to_json(made))


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "MONKEY", "OMP_NUM_THREADS"])
def test_an_ordinary_value_is_shown(name: str) -> None:
    assert f"-e {name}=4" in render.to_shell(plan(env=(f"{name}=4",)))


def test_a_variable_given_wins_over_a_default() -> None:
    assert environment(plan(env=("SPEC_TYPE=evaluator",)))["SPEC_TYPE"] == "evaluator"


def test_mounts_are_relative_to_the_caller_and_replace_defaults() -> None:
    made = plan(mount=("data/../x:/mnt/x:ro", "~/y:/root/tmp/"), data="graph")
    assert made.mounts[2:] == (
        Mount(source="/home/me/y", target="/root/tmp"),
        Mount(source="/home/me/projects/graph", target="/data", read_only=True),
        Mount(source="/home/me/projects/x", target="/mnt/x", read_only=True),
    )


def test_the_config_mount_can_be_written_to_or_left_out() -> None:
    assert plan(config_mount="rw").mounts[1] == Mount(
        source="/home/me/.config", target="/root/.config"
    )
    assert "/root/.config" not in [mount.target for mount in plan(config_mount="none").mounts]


def test_a_path_with_a_comma_survives_the_line() -> None:
    line = render.to_shell(plan(mount=("/a,b:/c",)))
    assert 'type=bind,"source=/a,b",target=/c' in shlex.split(line)


@pytest.mark.parametrize(
    ("asked", "gpus", "option"),
    [
        ("all", Gpus(count=-1), "all"),
        ("2", Gpus(count=2), "2"),
        ("0,1", Gpus(ids=("0", "1")), '"device=0,1"'),
        ("device=0", Gpus(ids=("0",)), '"device=0"'),
        ("GPU-ab12", Gpus(ids=("GPU-ab12",)), '"device=GPU-ab12"'),
    ],
)
def test_gpus_ask_for_the_capability_that_shows_everything(
    asked: str, gpus: Gpus, option: str
) -> None:
    made = plan(gpus=asked)
    assert (made.gpus, made.image) == (gpus, "local/torch:gpu")
    line = shlex.split(render.to_shell(made))
    assert line[line.index("--gpus") + 1] == option
    request = render.to_engine(made, "owner")["HostConfig"]["DeviceRequests"][0]
    assert request["Capabilities"] == [["gpu"]]
    assert (request["Count"], request["DeviceIDs"]) == (gpus.count, list(gpus.ids) or None)


def test_limits_reach_the_engine_in_its_units() -> None:
    host = render.to_engine(plan(memory="1.5g", cpus=1.5, shm_size="512m"), "owner")["HostConfig"]
    assert (host["Memory"], host["NanoCpus"], host["ShmSize"]) == (3 << 29, 1500000000, 512 << 20)


def test_processes_per_node_go_by_torchruns_own_variable() -> None:
    assert environment(plan(nproc_per_node="2"))["PET_NPROC_PER_NODE"] == "2"


def test_a_container_says_who_removes_it() -> None:
    assert render.to_engine(plan(), "host:1:boot")["Labels"]["tml.owner"] == "host:1:boot"


def test_root_may_pass_other_peoples_permissions_only_where_it_must() -> None:
    root = replace(HOST, uid=0, gid=0, user="root")
    assert plan(root).cap_add == ()
    assert plan(replace(root, foreign_mounts=True)).cap_add == ("DAC_OVERRIDE",)
    assert plan(replace(HOST, foreign_mounts=True)).cap_add == ()
    assert "--cap-add DAC_OVERRIDE" in render.to_shell(plan(replace(root, foreign_mounts=True)))


def test_an_engine_that_docker_would_not_find_is_named_in_the_line() -> None:
    found = plan(replace(HOST, endpoint="unix:///run/user/1000/docker.sock"))
    assert render.to_shell(found).startswith("docker -H unix:///run/user/1000/docker.sock run ")


def test_the_shell_and_the_tests_have_the_mounts_of_a_run() -> None:
    shell = plans.plan_shell(Request(), HOST, "1234")
    tests = plans.plan_test(Request(), HOST, "1234")
    assert shell.mounts == tests.mounts == plan().mounts
    assert (shell.command, shell.interactive, shell.tty) == (("bash",), True, False)
    assert (tests.image, tests.workdir) == ("local/torch:dev", "/usr/src/app/tml")


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"gpus": "0"}, "--gpus '0'"),
        ({"gpus": "some"}, "--gpus 'some'"),
        ({"shm_size": "big"}, "--shm-size 'big'"),
        ({"memory": "0"}, "--memory '0'"),
        ({"cpus": 0.0}, "--cpus 0"),
        ({"mount": ("/a",)}, "--mount '/a'"),
        ({"mount": ("/a:b",)}, "--mount '/a:b'"),
        ({"mount": ("/a:/b:x",)}, "--mount '/a:/b:x'"),
        ({"mount": ("/a:/",)}, "--mount '/a:/'"),
        ({"mount": ("/var/run/docker.sock:/s",)}, "engine's socket"),
        ({"mount": ("/srv/x/podman.sock:/s",)}, "engine's socket"),
        ({"mount": ("/:/host:ro",)}, "has the engine's socket /run/docker.sock in it"),
        ({"mount": ("/run:/r",)}, "mount source /run has the engine's socket"),
        ({"mount": ("/var/../var/run/:/r",)}, "mount source /var/run has the engine's socket"),
        ({"data": "/var"}, "mount source /var has the engine's socket"),
        ({"data": "/"}, "mount source / has the engine's socket"),
        ({"publish": ("80",)}, "leave --publish out, or add --network bridge"),
        ({"publish": ("80",), "network": "none"}, "--publish 80 with --network none"),
        # A number that is no port is wrong whatever the network.
        ({"publish": ("99999",)}, "--publish '99999': a port is 1 to 65535"),
        ({"publish": ("0",), "network": "bridge"}, "--publish '0': a port is 1 to 65535"),
        ({"publish": ("80:65536",), "network": "bridge"}, "a port is 1 to 65535"),
        ({"publish": ("http",), "network": "bridge"}, "--publish 'http': expected PORT"),
        ({"publish": ("0.0.0.0:80:80",), "network": "bridge"}, "always published at 127.0.0.1"),
        ({"publish": (":80",), "network": "bridge"}, "--publish ':80'"),
        ({"env": ("my.token=planted",)}, "the name of a secret"),
        ({"env": ("BASH_ENV",)}, "--env BASH_ENV: give its value"),
        ({"env": ("BASH_ENV=/x", "TOKEN")}, "--env BASH_ENV: secrets (TOKEN) travel through it"),
        ({"env": ("=x",)}, "--env ''"),
        ({"env": ("a b=x",)}, "--env 'a b'"),
        ({"nproc_per_node": "0"}, "--nproc-per-node '0'"),
        ({"name": "a/b"}, "--name 'a/b'"),
        ({"stop_grace_s": -1}, "--stop-grace -1"),
    ],
)
def test_a_wrong_flag_is_named_with_its_value(request_: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan(**request_)
    assert said in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_wrong_variable_does_not_show_its_value() -> None:
    with pytest.raises(UsageError) as caught:
        plan(env=("MY-TOKEN!=planted",))
    assert "planted" not in str(caught.value)


def test_the_socket_that_is_used_is_refused_wherever_it_is() -> None:
    for host in (
        replace(HOST, engine_url="unix:///srv/engine/d.sock"),
        replace(HOST, environment={"DOCKER_HOST": "unix:///srv/engine/d.sock"}),
    ):
        for source in ("/srv", "/srv/engine", "/srv/engine/d.sock"):
            with pytest.raises(UsageError, match=f"mount source {source} .*engine's socket"):
                plan(host, mount=(f"{source}:/x",))
        # A name that only begins like the folder's is another folder.
        assert plan(host, mount=("/srv/eng:/x",)).mounts[-1].source == "/srv/eng"


def test_a_socket_below_the_config_folder_says_how_to_go_on() -> None:
    host = replace(HOST, engine_url="unix:///home/me/.config/colima/docker.sock")
    with pytest.raises(UsageError, match="--config-mount none leaves it out"):
        plan(host)
    assert plan(host, config_mount="none")


def test_a_port_is_published_on_this_machine_alone() -> None:
    made = plan(network="bridge", publish=("8080:80", "9000", "9000"))
    assert made.ports == (Port(host=8080, container=80), Port(host=9000, container=9000))
    sent = render.to_engine(made, "owner")
    assert sent["ExposedPorts"] == {"80/tcp": {}, "9000/tcp": {}}
    assert sent["HostConfig"]["PortBindings"] == {
        "80/tcp": [{"HostIp": "127.0.0.1", "HostPort": "8080"}],
        "9000/tcp": [{"HostIp": "127.0.0.1", "HostPort": "9000"}],
    }
    line = render.to_shell(made)
    assert "--publish 127.0.0.1:8080:80 --publish 127.0.0.1:9000:9000" in line


def test_a_read_only_root_leaves_two_places_in_memory_to_write_to() -> None:
    made = plan(read_only=True)
    host = render.to_engine(made, "owner")["HostConfig"]
    assert host["ReadonlyRootfs"] is True
    assert host["Tmpfs"] == {
        "/tmp": "rw,exec,nosuid,nodev,mode=1777,size=2g",
        "/root": "rw,exec,nosuid,nodev,mode=1777,size=1g",
    }
    line = render.to_shell(made)
    assert "--read-only --tmpfs /tmp:rw,exec,nosuid,nodev,mode=1777,size=2g --tmpfs /root:" in line
    assert "ReadonlyRootfs" not in render.to_engine(plan(), "owner")["HostConfig"]


def test_a_mount_takes_the_place_of_what_is_in_memory() -> None:
    made = plan(read_only=True, mount=("/big:/tmp",))
    assert list(render.to_engine(made, "owner")["HostConfig"]["Tmpfs"]) == ["/root"]


def test_podman_keeps_the_callers_ids_in_its_own_line() -> None:
    made = plan(replace(HOST, engine="podman-rootless", endpoint="unix:///run/user/1000/p.sock"))
    assert render.to_engine(made, "owner")["HostConfig"]["UsernsMode"] == "keep-id"
    line = render.to_shell(made)
    assert line.startswith("podman run ")
    assert "--user 1000:1001 --userns keep-id" in line
    assert "UsernsMode" not in render.to_engine(plan(), "owner")["HostConfig"]


# Several containers


def up(host: Host = HOST, **request: Any) -> plans.Gang:
    """A plan of an `up` of twhin."""
    return plans.plan_up(Request(**request), host, TWHIN, "1234")


def test_a_gang_is_a_chief_and_workers_on_a_network_of_their_own() -> None:
    gang = up(workers=2)
    assert [member.name for member in gang.members] == [
        "tml-twhin-1234-chief",
        "tml-twhin-1234-worker-1",
        "tml-twhin-1234-worker-2",
    ]
    assert {member.network for member in gang.members} == {gang.network} == {"tml-twhin-1234"}
    chief, first, _ = (environment(member) for member in gang.members)
    assert chief["PET_NNODES"] == first["PET_NNODES"] == "3"
    assert chief["PET_RDZV_ENDPOINT"] == first["PET_RDZV_ENDPOINT"] == "chief:29500"
    assert (chief["PET_RDZV_CONF"], first["PET_RDZV_CONF"]) == ("is_host=true", "is_host=false")
    assert (chief["SPEC_TYPE"], first["SPEC_TYPE"]) == ("chief", "worker")


@pytest.mark.parametrize("workers", [0, 1, 9, 10, 99, 100])
def test_the_chiefs_host_name_comes_first(workers: int) -> None:
    names = [member.hostname for member in up(workers=workers).members]
    assert names == sorted(names)
    assert names[0].endswith("-chief")


def test_what_serves_and_follows_is_no_node_of_torchrun() -> None:
    gang = up(workers=0, datasetworkers=2, evaluator=True)
    chief, *others = gang.members
    assert [member.member for member in others] == [
        "datasetworker-1",
        "datasetworker-2",
        "evaluator",
    ]
    assert environment(chief)["PET_NNODES"] == "1"
    expected = "datasetworker-1:50051,datasetworker-2:50051"
    assert environment(chief)["TML_DATASETWORKERS"] == expected
    assert all("PET_NNODES" not in environment(other) for other in others)


def test_only_the_chief_publishes_ports() -> None:
    gang = up(workers=1, publish=("6006",))
    assert [len(member.ports) for member in gang.members] == [1, 0]


def test_the_members_find_each_other_by_name() -> None:
    chief, worker = up(workers=1).members
    sent = render.to_engine(worker, "owner")
    assert sent["Hostname"] == "1-worker"
    endpoints = sent["NetworkingConfig"]["EndpointsConfig"]
    assert endpoints == {"tml-twhin-1234": {"Aliases": ["worker-1"]}}
    assert "--network tml-twhin-1234 --hostname 0-chief --network-alias chief" in render.to_shell(
        chief
    )
    assert not {"Hostname", "NetworkingConfig"} & set(render.to_engine(plan(), "owner"))


def test_the_lines_of_a_gang_make_start_wait_and_remove() -> None:
    lines = [shlex.split(line) for line in render.gang_to_shell(up(datasetworkers=1)).splitlines()]
    names = [f"tml-twhin-1234-{member}" for member in ("chief", "worker-1", "datasetworker-1")]
    assert lines[0][:3] == ["docker", "network", "create"]
    assert [line[line.index("--name") + 1] for line in lines[1:4]] == names
    assert all(line[:3] == ["docker", "run", "-d"] for line in lines[1:4])
    # What serves does not end by itself.
    assert lines[4:] == [
        ["docker", "logs", "-f", names[0]],
        ["docker", "wait", *names[:2]],
        ["docker", "rm", "--force", "--volumes", *names],
        ["docker", "network", "rm", "tml-twhin-1234"],
    ]


def test_a_gang_as_json_hides_secrets() -> None:
    data = json.loads(json.dumps(render.gang_to_json(up(env=("TOKEN",)))))
    assert [member["role"] for member in data["members"]] == ["chief", "worker"]
    assert {"name": "TOKEN", "value": None, "secret": True} in data["members"][1]["env"]
    assert "planted" not in render.gang_to_shell(up(env=("TOKEN",)))


@pytest.mark.parametrize(
    ("args", "folder"),
    [
        ((), "/home/me/tmp/runs/twhin"),
        (("--save_dir=/root/tmp/a",), "/home/me/tmp/a"),
        (("--save_dir", "/mnt/x/../x/b"), "/big/b"),
        (("--save_dir=tml/runs",), "/home/me/tml/runs"),
        (("--save_dir=/mnt/y/c",), "/small/c"),
    ],
)
def test_logs_are_kept_in_the_run_folder(args: tuple[str, ...], folder: str) -> None:
    mounts = ("/big:/mnt/x", "/small://mnt/z/../y/")
    assert up(args=args, mount=mounts).logs == f"{folder}/logs/tml-twhin-1234"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--save_dir=/nowhere",), "mount one: --mount SRC:DST"),
        (("--save_dir", "runs/x"), "give a folder below /root/tmp, which is ~/tmp here"),
        (("--save_dir=/root/tmp/a", "--save_dir=/root/a"), "--save_dir /root/a lies inside"),
        (("--save_dir=/home/me/tmp/a",), "--save_dir=/root/tmp/a is /home/me/tmp/a there"),
        (("--save_dir=~/tmp/a",), "--save_dir=/root/tmp/a is /home/me/tmp/a there"),
        (("--save_dir=/mnt/r/a",), "/mnt/r is mounted read-only"),
    ],
)
def test_a_run_that_would_be_lost_with_its_container_is_refused(
    args: tuple[str, ...], words: str
) -> None:
    for make in (plan, up):
        with pytest.raises(UsageError, match="--save_dir") as refused:
            make(args=args, mount=("/big:/mnt/r:ro",))
        assert words in str(refused.value)
