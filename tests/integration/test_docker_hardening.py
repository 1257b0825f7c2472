"""What a container may not do, on the real engine: no privileges, no socket, no ports for others,
no end of processes; that training works all the same; and that secrets show nowhere.
"""

import hashlib
import os
import secrets as random
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.stand_in import STAND_IN, containers
from tml.docker import plan as plans
from tml.docker import render
from tml.docker.checkout import find_project
from tml.docker.container import Container
from tml.docker.plan import Host, Request

pytestmark = pytest.mark.docker

root_only = pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")

# As the second and as the first version of cgroups have them.
PIDS = "/sys/fs/cgroup/pids.{0}", "/sys/fs/cgroup/pids/pids.{0}"

PARALLEL = """
import ctypes, multiprocessing, os, shutil, sys, tempfile
from multiprocessing import shared_memory

def square(number):
    return number * number

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(square, range(5)) == [0, 1, 4, 9, 16]
    block = shared_memory.SharedMemory(create=True, size=1 << 20)
    block.close()
    block.unlink()
    with tempfile.TemporaryFile() as file:
        file.write(b"x")
    import torch
    rows = torch.utils.data.DataLoader(list(range(8)), batch_size=4, num_workers=2)
    assert [len(batch) for batch in rows] == [4, 4]
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    os.makedirs(cache_dir(), exist_ok=True)
    assert cache_dir() == "/tmp/torchinductor", cache_dir()
    # What torch.compile makes is a library: it must be possible to load one from there.
    library = os.path.join(cache_dir(), "library.so")
    shutil.copy(os.path.join(os.path.dirname(torch.__file__), "lib", "libshm.so"), library)
    ctypes.CDLL(library)
    print("parallel")
"""


def become(launcher: Any, uid: int, gid: int) -> None:
    """Have the launcher called by another user, who owns its folders."""
    group = os.stat("/var/run/docker.sock").st_gid
    for folder, _, files in os.walk(launcher.base):
        os.chown(folder, uid, gid)
        for name in files:
            os.chown(Path(folder) / name, uid, gid)
    for folder in (launcher.base, launcher.home):
        os.chown(folder, uid, gid)
        Path(folder).chmod(0o755)
    # This Python may lie in a folder that only root reads.
    readable = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    user = ["--reuid", str(uid), "--regid", str(gid), "--groups", str(group)]
    launcher.argv = ["setpriv", *user, *readable, *launcher.argv]


@pytest.mark.parametrize("verb", [("run",), ("up", "--workers", "0")])
def test_no_capability_no_new_privileges_and_an_end_of_processes(
    launcher: Any, verb: tuple[str, ...]
) -> None:
    limits = " ".join(PIDS).format("max")
    launcher.script(f"grep -E '^(Cap|NoNew)' /proc/self/status; cat {limits} 2>/dev/null; true\n")
    done = launcher(verb[0], "standin", *verb[1:])
    assert done.returncode == 0, done.stderr
    words = done.stdout.replace("chief | ", "").split()
    seen = dict(zip(words[::2], words[1::2], strict=False))
    assert {name: int(seen[f"Cap{name}:"], 16) for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == (
        dict.fromkeys(("Inh", "Prm", "Eff", "Bnd", "Amb"), 0)
    )
    assert seen["NoNewPrivs:"] == "1"
    assert words[-1] == str(plans.PIDS_LIMIT)


def test_a_fork_bomb_ends_at_the_limit(
    launcher: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The real limit would take this machine's processors for a while.
    monkeypatch.setattr(render, "PIDS_LIMIT", 64)
    bomb = (
        "import os, time\n"
        "first = os.getpid()\n"
        "while True:\n"
        "    try:\n"
        "        os.fork()\n"
        "    except BlockingIOError:\n"
        "        if os.getpid() == first:\n"
        f"            file, = filter(os.path.exists, {[p.format('current') for p in PIDS]})\n"
        "            print(open(file).read())\n"
        "            raise SystemExit(7)\n"
        "        time.sleep(0.1)\n"
    )
    (launcher.base / "bomb.py").write_text(bomb)
    launcher.script("exec python3 /usr/src/app/tml/bomb.py\n")
    (launcher.home / ".config").mkdir()
    (launcher.home / "tmp").mkdir()
    host = Host(
        checkout=launcher.base,
        home=launcher.home,
        cwd=launcher.home,
        uid=os.getuid(),
        gid=os.getgid(),
        user="me",
        environment={},
        terminal=False,
    )
    project = find_project(launcher.base, "standin")
    request = Request(network="none", cpus=0.5, memory="512m")
    container = Container.create(client, plans.plan_run(request, host, project, "b0b0"))
    try:
        container.start()
        code, said = client.wait(container.id, timeout=60)["StatusCode"], client.logs(container.id)
        assert code == 7, said
        assert 60 <= int(said) <= 64
    finally:
        container.remove()


def test_the_engines_socket_is_refused_in_every_guise(launcher: Any, tmp_path: Path) -> None:
    (tmp_path / "file").symlink_to("/var/run/docker.sock")
    (tmp_path / "folder").symlink_to("/run")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "e.sock").symlink_to("/var/run/docker.sock")
    used = {"DOCKER_HOST": f"unix://{tmp_path}/elsewhere/e.sock"}
    guises: list[tuple[list[str], dict[str, str]]] = [
        (["--mount", "/var/run/docker.sock:/x"], {}),
        (["--mount", "/var/run:/x:ro"], {}),
        (["--mount", "/run:/x"], {}),
        (["--mount", "/:/x:ro"], {}),
        (["--data", "/"], {}),
        (["--data", "/run"], {}),
        (["--mount", f"{tmp_path}/file:/x"], {}),
        (["--mount", f"{tmp_path}/folder:/x"], {}),
        (["--data", f"{tmp_path}/folder"], {}),
        (["--mount", f"{tmp_path}/elsewhere:/x"], used),
        (["--mount", f"{tmp_path}/elsewhere/e.sock:/x"], used),
    ]
    for flags, env in guises:
        done = launcher("run", "standin", *flags, **env)
        assert (done.returncode, done.stdout) == (2, ""), flags
        assert "the engine's socket" in done.stderr, flags
        assert "who holds that is root on this machine" in done.stderr


def test_a_published_port_is_reached_from_this_machine_alone(
    launcher: Any, client: Any, until: Any
) -> None:
    launcher.script("cd /tmp; exec python3 -m http.server 8000\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    network = f"tml-standin-ports-{os.getpid()}"
    client.create_network(network, labels={"tml.project": STAND_IN})
    process = launcher.start("run", "standin", "--network", network, "--publish", f"{port}:8000")

    def answers(address: str) -> bool:
        try:
            with socket.create_connection((address, port), timeout=2) as connection:
                connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
                return connection.recv(4) == b"HTTP"
        except OSError:
            return False

    try:
        until(lambda: answers("127.0.0.1"))
        # Another address of this machine.
        gateway = client.inspect_network(network)["IPAM"]["Config"][0]["Gateway"]
        assert not answers(gateway)
        listening = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
        places = [line.split()[1] for line in listening.splitlines() if f":{port:04X} " in line]
        assert {place.partition(":")[0] for place in places if place.endswith(f"{port:04X}")} <= {
            "0100007F"
        }
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        client.remove_network(network)


def test_a_port_that_is_taken_is_named(launcher: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = launcher("run", "standin", "--network", "bridge", "--publish", str(port))
    assert done.returncode == 125
    assert f"port {port} of this machine is taken" in done.stderr


@pytest.mark.parametrize("flags", [(), ("--read-only",), ("--read-only", "--user", "4321:4321")])
def test_python_in_parallel_works_with_all_of_it(launcher: Any, flags: tuple[str, ...]) -> None:
    (launcher.base / "parallel.py").write_text(PARALLEL)
    launcher.script("exec python /usr/src/app/tml/parallel.py\n")
    done = launcher("run", "standin", "--network", "none", *flags)
    assert (done.returncode, done.stdout) == (0, "parallel\n"), done.stderr


@pytest.mark.parametrize("verb", [("run",), ("up", "--workers", "0")])
def test_a_read_only_root_can_be_written_to_where_it_must_and_nowhere_else(
    launcher: Any, verb: tuple[str, ...]
) -> None:
    launcher.script(
        "for folder in /root/tmp /tmp ~ ~/.cache /usr/src/app/tml /usr /usr/src/app /opt/venv /etc "
        "/run /var/tmp; do mkdir -p $folder 2>/dev/null; touch $folder/written 2>/dev/null && "
        "echo $folder; done\n"
        "ls -d ~/.config ~/tmp\n"
    )
    done = launcher(verb[0], "standin", "--read-only", *verb[1:])
    assert done.returncode == 0, done.stderr
    assert done.stdout.replace("chief | ", "").split() == [
        *("/root/tmp", "/tmp", "/root", "/root/.cache", "/usr/src/app/tml"),
        *("/root/.config", "/root/tmp"),
    ]
    assert (launcher.home / "tmp" / "written").exists()


@root_only
@pytest.mark.parametrize("verb", [("run",), ("up", "--workers", "1")])
def test_what_is_written_belongs_to_the_caller_who_is_not_root(
    launcher: Any, verb: tuple[str, ...]
) -> None:
    launcher.script(
        "mkdir -p /root/tmp/runs/standin/10; echo $TOKEN > /root/tmp/runs/standin/10/$SPEC_TYPE\n"
    )
    become(launcher, 4321, 4322)
    done = launcher(verb[0], "standin", "--env", "TOKEN", *verb[1:], TOKEN="planted")
    assert done.returncode == 0, done.stderr
    written = list(launcher.home.rglob("*"))
    assert launcher.home / "tmp/runs/standin/10/chief" in written
    assert (launcher.home / "tmp/runs/standin/10/chief").read_text() == "planted\n"
    assert {(path.stat().st_uid, path.stat().st_gid) for path in written} == {(4321, 4322)}


# Secrets


class Secrets:
    """Two secrets, and everything here that they could show in."""

    def __init__(self, launcher: Any, client: Any) -> None:
        self.launcher, self.client = launcher, client
        self.words = {name: f"planted{random.token_hex(8)}" for name in ("TOKEN", "API_KEY")}
        # What a shell, a line or a quote could break.
        self.values = {name: f"{word} '\"$HOME`id`\n\\" for name, word in self.words.items()}
        self.flags = ["--env", "TOKEN", "--env", f"API_KEY={self.values['API_KEY']}"]
        self.env = {"TOKEN": self.values["TOKEN"]}
        # Says by a hash that the values are right, then waits to be looked at.
        self.script = (
            'mkdir -p /root/tmp/seen; printf %s "$TOKEN$API_KEY" | sha256sum | cut -c1-64 '
            "> /root/tmp/seen/${1:-$(hostname)}\n"
            "until [ -e /root/tmp/go ]; do sleep 0.1; done\n"
        )
        self.hash = hashlib.sha256("".join(self.values.values()).encode()).hexdigest()

    def seen(self) -> list[str]:
        """What the containers have seen, as hashes."""
        folder = self.launcher.home / "tmp" / "seen"
        return [file.read_text().strip() for file in folder.glob("*")]

    def go(self) -> None:
        """Let the containers end."""
        (self.launcher.home / "tmp" / "go").touch()

    def shown(self, text: str) -> list[str]:
        """Names of the secrets that show in a text."""
        return [name for name, word in self.words.items() if word in text]

    def shown_in_engine(self, names: list[str]) -> list[str]:
        """Names of those that the engine would tell, or has on disk, of running containers."""
        texts = []
        for name in names:
            found = self.client.inspect_container(name)
            texts += [str(found), str(self.client.history(found["Image"]))]
            texts += [str(self.client.inspect_image(found["Image"])), str(self.client.top(name))]
            texts += [self.client.logs(name).decode(errors="replace")]
            texts += [str(self.client.inspect_network(n)) for n in networks_of(found)]
            texts += files_below(Path(found["HostnamePath"]).parent)
        return self.shown("".join(texts))

    def shown_in_arguments(self) -> list[str]:
        """Names of those in the arguments of some process, but for a launcher's own."""
        texts = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                text = file.read_bytes().decode(errors="replace")
            except OSError:
                continue
            # NAME=VALUE was typed there; NAME alone was not.
            own = "tml.docker" in text
            texts.append(text.replace(self.words["API_KEY"], "") if own else text)
        return self.shown("".join(texts))

    def shown_in_files(self) -> list[str]:
        """Names of those in what is kept below home, logs and records, or left in memory."""
        texts = files_below(self.launcher.home)
        for folder in Path("/dev/shm").glob("tml-secrets-*"):
            texts += files_below(folder)
        return self.shown("".join(texts))


def networks_of(found: Any) -> list[str]:
    """Networks of an inspected container."""
    return list(found["NetworkSettings"]["Networks"])


def files_below(folder: Path) -> list[str]:
    """Contents of all files there that can be read."""
    texts = []
    for file in folder.rglob("*") if os.access(folder, os.R_OK) else ():
        try:
            if file.is_file():
                texts.append(file.read_text(errors="replace"))
        except OSError:
            continue
    return texts


@pytest.fixture
def planted(launcher: Any, client: Any) -> Iterator[Secrets]:
    """Secrets, and no container of theirs afterwards."""
    yield Secrets(launcher, client)
    for found in client.containers(all=True, filters={"name": "tml-standin-secret"}):
        client.remove_container(found["Id"], force=True)


VERBS: dict[str, tuple[list[str], list[str], int]] = {
    # How it is called, what follows --, and how many containers that is.
    "run": (["run", "standin"], [], 1),
    "run --detach": (["run", "standin", "--detach"], [], 1),
    "up": (["up", "standin", "--workers", "1"], [], 2),
    "up --detach": (["up", "standin", "--workers", "1", "--detach"], [], 2),
    "shell": (["shell"], ["-ic", ". tml/secret.sh"], 1),
    "test": (["test"], ["tests/test_secret.py"], 1),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_secret_shows_nowhere_but_inside(
    planted: Secrets, launcher: Any, client: Any, until: Callable[..., Any], verb: str
) -> None:
    words, args, count = VERBS[verb]
    name = f"tml-standin-secret-{random.token_hex(2)}"
    launcher.script(planted.script)
    (launcher.base / "secret.sh").write_text(planted.script)
    (launcher.base / "tests").mkdir()
    (launcher.base / "tests" / "test_secret.py").write_text(
        # Not by way of bash, which would read the secrets again.
        "import hashlib, os, pathlib, time\n\n"
        "def test_it():\n"
        "    seen = pathlib.Path('/root/tmp/seen')\n"
        "    seen.mkdir()\n"
        "    values = os.environ['TOKEN'] + os.environ['API_KEY']\n"
        "    (seen / 'test').write_text(hashlib.sha256(values.encode()).hexdigest())\n"
        "    while not pathlib.Path('/root/tmp/go').exists():\n"
        "        time.sleep(0.1)\n"
    )
    argv = [*words, "--name", name, *planted.flags]
    for show in ("--dry-run", "--json"):
        shown = launcher(*argv, show, "--", *args, **planted.env)
        assert shown.returncode == 0, shown.stderr
        assert planted.shown(shown.stdout + shown.stderr) == []
        assert "API_KEY" in shown.stdout

    process = launcher.start(*argv, "--", *args, **planted.env)
    until(lambda: planted.seen() == [planted.hash] * count or process.poll())
    assert planted.seen() == [planted.hash] * count, process.communicate()
    names = [found["Names"][0][1:] for found in client.containers(filters={"name": name})]
    assert len(names) == count
    assert planted.shown_in_engine(names) == []
    assert planted.shown_in_arguments() == []
    assert planted.shown_in_files() == []
    assert list(Path("/dev/shm").glob(f"tml-secrets-*-{process.pid}-*")) == []
    # A later process has them as the first had: bash by itself.
    later = client.exec_create(names[0], ["bash", "-c", 'printf %s "$TOKEN$API_KEY"'])["Id"]
    assert client.exec_start(later).decode() == "".join(planted.values.values())
    assert planted.shown(str(client.exec_inspect(later))) == []

    planted.go()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert planted.shown(out + err) == []
    until(lambda: not client.containers(all=True, filters={"name": name}))
    until(lambda: verb[-8:] != "--detach" or '"ended"' in "".join(files_below(launcher.home)))
    assert planted.shown_in_files() == []


def test_a_container_that_is_started_again_has_its_secrets_again(
    planted: Secrets, launcher: Any
) -> None:
    planted.script = planted.script.splitlines()[0] + "\n"
    launcher.script(
        "[ -e /root/tmp/again ] && set -- second || set -- first\n"
        f"{planted.script}"
        "[ $1 = second ] || { touch /root/tmp/again; exit 3; }\n"
    )
    done = launcher(
        *("up", "standin", "--workers", "0", "--max-restarts", "1", *planted.flags), **planted.env
    )
    assert done.returncode == 0, done.stderr
    assert planted.seen() == [planted.hash] * 2
    assert planted.shown(done.stdout + done.stderr) == []
    assert planted.shown_in_files() == []


def test_a_container_that_could_not_be_made_leaves_no_secret(
    planted: Secrets, launcher: Any
) -> None:
    launcher.script("true\n")
    done = launcher("run", "standin", "--network", "tml-no-such", *planted.flags, **planted.env)
    assert done.returncode == 125
    assert planted.shown(done.stdout + done.stderr) == []
    assert planted.shown_in_files() == []


# The lines of `up --dry-run`


def test_the_lines_start_the_containers_that_up_starts(
    launcher: Any, client: Any, until: Callable[..., Any]
) -> None:
    launcher.script("exec sleep 60\n")
    name = f"tml-standin-lines-{os.getpid()}"
    argv = ["up", "standin", "--workers", "1", "--name", name, "--stop-grace", "1"]
    argv += ["--memory", "1g", "--cpus", "0.5", "--read-only", "--publish", "18099"]
    filters = {"name": name}

    def inspected() -> list[dict[str, Any]]:
        until(lambda: len(client.containers(filters={**filters, "status": "running"})) == 2)
        found = [client.inspect_container(c["Id"]) for c in client.containers(filters=filters)]
        return sorted(found, key=lambda container: str(container["Name"]))

    process = launcher.start(*argv)
    ours, our_network = inspected(), client.inspect_network(name)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)

    lines = launcher(*argv, "--dry-run").stdout.splitlines()
    start, end = lines[:3], lines[-2:]
    subprocess.run(["bash", "-e", "-c", "\n".join(start)], env=launcher.env, check=True)
    try:
        typed, typed_network = inspected(), client.inspect_network(name)
    finally:
        subprocess.run(["bash", "-c", "\n".join(end)], env=launcher.env, check=True)

    for found in (*ours, *typed):
        for label in ("tml.run", "tml.owner"):
            found["Config"]["Labels"].pop(label, None)
        # The run's own id, by which its nodes meet.
        found["Config"]["Env"] = sorted(
            item for item in found["Config"]["Env"] if not item.startswith("PET_RDZV_ID=")
        )
    for a, b in zip(ours, typed, strict=True):
        assert a["Name"] == b["Name"]
        for part in ("Config", "HostConfig"):
            # docker spells "not set" in several ways: null, [], -1.
            one, other = ({k: v for k, v in x[part].items() if v and v != -1} for x in (a, b))
            assert one == other
        names = [x["NetworkSettings"]["Networks"][name]["Aliases"] for x in (a, b)]
        assert sorted(names[0]) == sorted(names[1])
    for part in ("Driver", "Internal", "Options"):
        assert our_network[part] == typed_network[part]
    labels = [network["Labels"].keys() - {"tml.owner"} for network in (our_network, typed_network)]
    assert labels[0] == labels[1]


def test_the_lines_pasted_as_they_are_do_the_job_and_remove_it(launcher: Any, client: Any) -> None:
    launcher.script("getent hosts chief >/dev/null && echo $SPEC_TYPE done; exit ${#SPEC_TYPE}\n")
    for folder in (".config", "tmp"):
        (launcher.home / folder).mkdir()
    lines = launcher("up", "standin", "--workers", "1", "--dry-run").stdout
    done = subprocess.run(
        ["bash", "-c", lines], env=launcher.env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    # What the chief says, and how each has ended: chief has five letters, worker six.
    assert "chief done" in printed
    after = printed[printed.index("chief done") + 1 :]
    assert after[:2] == ["5", "6"]
    assert containers(client) == []
