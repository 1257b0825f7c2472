"""What is known of failures: rules from a container's end to what happened and what to do about it.

Each rule looks at the container and at its lines, and returns a `Finding` where it knows them. The
texts that they look for were seen on the engine; tests/unit/test_docker_postmortem.py has them.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tml.docker.evidence import (
    Ended,
    engine_error,
    lost_a_peer,
    own_error,
    root_rank,
    root_signal,
    shorten,
    signal_name,
)
from tml.docker.plan import CHECKOUT, DATA, IMAGES, PIDS_LIMIT, Plan


@dataclass(frozen=True)
class Finding:
    """What was recognized, to stand behind how the container ended, and what to do about it; a
    remedy of "": `what` says it, or nothing is known.
    """

    what: str
    remedy: str


def find_reason(ended: Ended, lines: list[str]) -> Finding | None:
    """The first of the rules that knows this end."""
    return next(filter(None, (rule(ended, lines) for rule in RULES)), None)


def _line(lines: Sequence[str], pattern: str) -> re.Match[str] | None:
    """The last line that `pattern` is found in."""
    return next(filter(None, (re.search(pattern, line) for line in reversed(lines))), None)


def _out_of_memory(ended: Ended, lines: list[str]) -> Finding | None:
    if not ended.oom_killed:
        return None
    who = "" if ended.exit_code == 137 else "a process in it was killed, "
    limit = ended.plan.memory_bytes
    peak = ended.memory_peak
    # Looked at every few seconds: what it had long before its end would mislead.
    telling = peak and (limit is None or peak > limit / 2)
    seen = f", {in_bytes(peak)} in use" if peak and telling else ""
    smaller = "make the job smaller: batch size, embedding_dim, fewer processes (--nproc-per-node)"
    if limit is None:
        return Finding(
            f"{who}out of memory: no limit of its own, the machine had no more{seen}",
            f"{smaller}; or close what else takes memory on this machine (dmesg names it)",
        )
    return Finding(
        f"{who}out of memory: limit {in_bytes(limit)}{seen}",
        f"raise --memory above {in_bytes(limit)}, or {smaller}",
    )


def _cut_off(ended: Ended, lines: list[str]) -> Finding | None:
    if not ended.cut_off:
        return None
    return Finding(
        "",
        f"somebody disconnected it (docker network disconnect, a firewall, a restart of the "
        f"engine's network): see `docker events --since 10m --filter network="
        f"{ended.plan.network}`, then start the job again; it goes on from its last checkpoint",
    )


def _no_gpu_runtime(ended: Ended, lines: list[str]) -> Finding | None:
    if not _line([*lines, ended.error], "could not select device driver"):
        return None
    return Finding(
        "the engine has no GPU runtime",
        "install the NVIDIA Container Toolkit, run `nvidia-ctk runtime configure "
        "--runtime=docker` and restart the engine; or leave --gpus out to train on the processor",
    )


def _shared_memory(ended: Ended, lines: list[str]) -> Finding | None:
    said = _line(
        lines,
        r"Bus error|SIGBUS|unable to allocate shared memory\(shm\)"
        r"|out of shared memory|No space left on device.*/dev/shm|/dev/shm.*No space left",
    )
    worker = _line(lines, r"DataLoader worker \(pid.*(exited unexpectedly|killed by signal: Bus)")
    bus = "SIGBUS" in (signal_name(ended.exit_code or 0), root_signal(ended.last_lines))
    if not (said or bus or worker):
        return None
    size = in_bytes(ended.plan.shm_bytes)
    if worker and not (said or bus):
        what = f"a data loader's process died, most likely since /dev/shm ({size}) was full"
    else:
        what = f"{'most likely ' if bus else ''}/dev/shm ({size}) was full"
    return Finding(
        what,
        f"raise --shm-size above {size}: data loaders pass batches through it; or take fewer of "
        "their processes (num_workers), or a smaller batch size",
    )


def _cuda_memory(ended: Ended, lines: list[str]) -> Finding | None:
    said = _line(lines, r"CUDA out of memory|CUDA error: out of memory|OutOfMemoryError")
    if not said:
        return None
    return Finding(
        "CUDA out of memory",
        "the GPU's own memory is full, not the container's: a smaller batch size or "
        "embedding_dim, more GPUs (--gpus, --nproc-per-node); nvidia-smi shows who else uses it",
    )


def _unknown_user(ended: Ended, lines: list[str]) -> Finding | None:
    said = _line(
        [*lines, ended.error],
        r"getpwuid\(\): uid not found: \d+|[Uu]nable to find user [^:]+"
        r"|Could not determine home directory",
    )
    if not said:
        return None
    return Finding(
        said.group(0),
        "the image knows no such user: leave --user out (the launcher then passes "
        "HOME, USER and LOGNAME, which getpass and torch ask first), or give ids of digits, "
        "--user UID:GID",
    )


def _port_taken(ended: Ended, lines: list[str]) -> Finding | None:
    all_lines = [*lines, ended.error, *ended.last_lines]
    said = _line(all_lines, r"(?i)address already in use|EADDRINUSE|port is already allocated")
    if not said:
        return None
    text = said.string
    port = re.search(r"port: (\d+)|:(\d+) failed|', (\d+)\)|:(\d{2,5})\b", text)
    number = next(filter(None, port.groups()), "") if port else ""
    host = ended.plan.network == "host"
    see = f"`ss -ltnp 'sport = :{number}'`" if number else "`ss -ltnp`"
    return Finding(
        f"port {number} is in use already" if number else "a port is in use already",
        f"{see} {'on this machine' if host or 'allocated' in text else 'in the container'} shows "
        "by whom: end that, or choose another port"
        + (
            "; or give the container a network of its own: --network bridge"
            if host
            else " (--publish OTHER:PORT)"
            if "allocated" in text
            else ""
        ),
    )


def _disk_full(ended: Ended, lines: list[str]) -> Finding | None:
    all_lines = [*lines, ended.error]
    said = _line(all_lines, r"No space left on device|ENOSPC|Disk quota exceeded")
    torch = _line(all_lines, r"unexpected pos \d+ vs \d+|PytorchStreamWriter failed writing")
    if not (said or torch):
        return None
    named = re.search(r"(/[\w./@+-]+)", said.string) if said else None
    inside = named.group(1) if named else None
    outside = _on_host(ended.plan, inside) if inside else None
    if outside:
        return Finding(
            f"No space left on device: {outside}",
            f"`df -h {outside}` shows how full it is: make room there (old step folders, old "
            "runs), or write elsewhere (--save_dir), then start the same command again",
        )
    where = f" ({inside} in the container)" if inside else ""
    places = " ".join(dict.fromkeys(m.source for m in ended.plan.mounts if not m.read_only))
    return Finding(
        f"No space left on device{where}"
        if said
        else "a file could not be written to its end, most likely for want of space",
        f"`df -h {places}` and `docker system df` show what is full: make room there, then start "
        "the same command again",
    )


def _may_not_write(ended: Ended, lines: list[str]) -> Finding | None:
    said = _line(lines, r"(Read-only file system|Permission denied): '?(/[\w./@+-]+)'?")
    if not said or ended.exit_code in (126, 127):
        return None
    why, inside = said.groups()
    outside = _on_host(ended.plan, inside)
    what = f"{why}: {inside}" + (f", which is {outside} here" if outside else "")
    if why.startswith("Read-only"):
        hint = "write into a mount that is not read-only (--mount SRC:DST, --save_dir)"
        if ended.plan.read_only_root and outside is None:
            hint += ", or leave --read-only out"
        if inside.startswith((f"{DATA}/", f"{DATA}'")) or inside == DATA:
            hint += "; --data is always read-only"
        return Finding(what, hint)
    place = f"`ls -ld {outside}`" if outside else "that path"
    return Finding(
        what,
        f"the container runs as user {ended.plan.user}: make {place} theirs (chown), or choose "
        "the user with --user UID:GID",
    )


def _too_many_processes(ended: Ended, lines: list[str]) -> Finding | None:
    if not _line(lines, r"can't start new thread|[Rr]esource temporarily unavailable|pthread_crea"):
        return None
    return Finding(
        "no further process or thread could be started",
        f"a container may have {PIDS_LIMIT} of them, and the user may have a limit (ulimit -u): "
        "fewer processes (--nproc-per-node), fewer data loaders (num_workers), OMP_NUM_THREADS=1",
    )


def _no_cuda(ended: Ended, lines: list[str]) -> Finding | None:
    said = _line(
        lines, r"Torch not compiled with CUDA enabled|Found no NVIDIA driver|No CUDA GPUs are avail"
    )
    if not said:
        return None
    hint = (
        "`nvidia-smi` on this machine and `python -m tml.docker doctor` show what is missing"
        if ended.plan.gpus
        else f"start it with --gpus all, which takes {IMAGES['gpu']}; or train on the processor"
    )
    return Finding(said.group(0), hint)


def _memory_refused(ended: Ended, lines: list[str]) -> Finding | None:
    said = _line(lines, r"you tried to allocate (\d+) bytes|^(?:\[rank\d+\]: )?MemoryError")
    if not said:
        return None
    asked = f"{in_bytes(int(said.group(1)))} at once" if said.group(1) else "more memory"
    return Finding(
        f"it asked for {asked} and was refused",
        "a smaller batch size, embedding_dim or table; or a machine with more memory",
    )


def _nccl(ended: Ended, lines: list[str]) -> Finding | None:
    said = _line(lines, r"NCCL error.*|ncclSystemError.*|ncclInternalError.*")
    if not said:
        return None
    return Finding(
        shorten(said.group(0), 120),
        "run it again with --env NCCL_DEBUG=INFO, which names the device or the network that "
        "failed; too small a /dev/shm is a usual reason (--shm-size, now "
        f"{in_bytes(ended.plan.shm_bytes)})",
    )


def _no_rendezvous(ended: Ended, lines: list[str]) -> Finding | None:
    said = _line(
        [*lines, *ended.last_lines],
        r"RendezvousConnectionError|RendezvousTimeoutError|client socket has (timed out|failed)",
    )
    if not said:
        return None
    return Finding(
        "it did not find the other containers of the job",
        "look at how the chief began: it must run, and listen, before the others give up; a "
        "network other than the job's own, or a chief that ended early, are the usual reasons",
    )


def _not_started(ended: Ended, lines: list[str]) -> Finding | None:
    command = " ".join(ended.plan.command[:3])
    if ended.exit_code == 127:
        said = _line([*lines, engine_error(ended)], r".*(not found|No such file or directory).*")
        return Finding(
            shorten(said.group(0).strip(), 160) if said else "its command was not found",
            f"it ran `{command}`: look for a wrong path or a missing program. The checkout is at "
            f"{CHECKOUT}; what the image holds: python -m tml.docker shell",
        )
    if ended.exit_code == 126:
        said = _line(
            [*lines, engine_error(ended)], r".*(Permission denied|permission denied|cannot exec).*"
        )
        return Finding(
            shorten(said.group(0).strip(), 160) if said else "its command cannot be executed",
            f"it ran `{command}`: make the file executable (chmod +x), or call it by its "
            "interpreter (bash FILE)",
        )
    return None


def _missing_module(ended: Ended, lines: list[str]) -> Finding | None:
    said = _line(lines, r"ModuleNotFoundError: No module named '([\w.]+)'")
    if not said:
        return None
    return Finding(
        said.group(0),
        "if requirements/ names it, the image is stale: python -m tml.docker build; if it is "
        f"yours, it must be below the checkout, which is {CHECKOUT} there",
    )


def _refused_by_program(ended: Ended, lines: list[str]) -> Finding | None:
    message = own_error(lines)
    if message is None or ended.exit_code not in (1, 2):
        return None
    return Finding(message, "")


def _killed(ended: Ended, lines: list[str]) -> Finding | None:
    inside = root_signal(ended.last_lines)
    own = signal_name(ended.exit_code or 0)
    if "SIGKILL" not in (own, inside) or ended.stopped_by_us:
        return None
    who = "" if own == "SIGKILL" else f"a process in it (rank {root_rank(ended.last_lines)}) got "
    return Finding(
        f"{who}{'SIGKILL, ' if who else ''}not from the launcher, and not out of its memory limit",
        "somebody killed it (kill -9, docker kill, docker rm -f), or the machine ran out of "
        "memory: `dmesg | grep -i 'killed process'` tells which; a limit, --memory, makes that "
        "the container's own affair",
    )


def _crashed(ended: Ended, lines: list[str]) -> Finding | None:
    own = signal_name(ended.exit_code or 0)
    name = own if own else root_signal(ended.last_lines)
    if name not in ("SIGSEGV", "SIGABRT", "SIGILL", "SIGFPE"):
        return None
    what = f"a process in it got {name}" if name != own else "a crash in compiled code"
    hint = (
        "this processor lacks an instruction that the image's torch was compiled for: another "
        "machine, or another wheel in requirements/"
        if name == "SIGILL"
        else "run it again with --env PYTHONFAULTHANDLER=1, which prints where each thread was"
    )
    return Finding(what, hint)


def _lost_peer(ended: Ended, lines: list[str]) -> Finding | None:
    if not lost_a_peer(ended):
        return None
    return Finding(
        "it lost a process that it trained with",
        "that one is the cause: look at the other containers' output, and at other ranks' lines "
        "above; then start the same command again, which goes on from the last checkpoint",
    )


def _stopped(ended: Ended, lines: list[str]) -> Finding | None:
    if signal_name(ended.exit_code or 0) not in ("SIGTERM", "SIGINT") or ended.stopped_by_us:
        return None
    return Finding(
        "not sent by the launcher",
        "somebody stopped it (docker stop, docker kill, kill): start the same command again, it "
        "goes on from its last checkpoint; `python -m tml.docker stop` ends a whole job",
    )


def _removed(ended: Ended, lines: list[str]) -> Finding | None:
    if ended.exit_code is not None or ended.error:
        return None
    return Finding(
        "",
        "docker rm -f or docker system prune by somebody else: `docker events --since 10m` names "
        "the time; start the same command again, it goes on from its last checkpoint",
    )


RULES: tuple[Callable[[Ended, list[str]], Finding | None], ...] = (
    # What the engine says counts before what the programs say, and what names a reason before what
    # only describes an end.
    _out_of_memory,
    _cut_off,
    _no_gpu_runtime,
    _shared_memory,
    _cuda_memory,
    _unknown_user,
    _port_taken,
    _disk_full,
    _may_not_write,
    _too_many_processes,
    _no_cuda,
    _memory_refused,
    _not_started,
    _missing_module,
    _refused_by_program,
    _killed,
    _crashed,
    _stopped,
    _removed,
    _lost_peer,
    _nccl,
    _no_rendezvous,
)


def _on_host(plan: Plan, inside: str) -> str | None:
    """Where a path in the container is on the host; None where it is in no mount."""
    for mount in sorted(plan.mounts, key=lambda mount: len(mount.target), reverse=True):
        if inside == mount.target or inside.startswith(f"{mount.target}/"):
            return mount.source + inside[len(mount.target) :]
    return None


def in_bytes(count: int) -> str:
    """A number of bytes for people: 64 MiB, 1.5 GiB."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.3g} {unit}" if size < 999.5 else f"{size:.0f} {unit}"
