"""Building the image, with progress.

Builds go through the engine's classic builder, which is what docker-py speaks; the same Dockerfile
builds with BuildKit, from the .build/ folder that `stage` writes.
"""

import fcntl
import io
import logging
import os
import re
import shutil
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tml.docker.errors import LauncherError
from tml.docker.image import (
    LABEL_INPUTS,
    TARGETS,
    build_arguments,
    built_from,
    hash_inputs,
    input_files,
)
from tml.docker.pip_settings import Offer, make_offer, read_pins, read_pip_settings
from tml.docker.plan import IMAGES, Variant
from tml.machines import environment

if TYPE_CHECKING:
    from docker import APIClient

logger = logging.getLogger(__name__)

STAGE_LABEL = "tml.stage=deps"
"""What the Dockerfile labels the stages with that are not kept."""
STAGED = ".build"
"""Folder of the checkout that offers wheels and pip's settings to BuildKit; git ignores it."""
LAST_LINES = 20
LOCK = "tml-build.lock"
"""In the folder of temporary files."""


def build_image(
    client: "APIClient", checkout: Path, variant: Variant, *, even_if_current: bool = True
) -> None:
    """Build the image of `variant`; for dev also the runtime image, whose large layer it shares.

    One at a time on a machine: at its end a build removes the stages without a name, which another
    one would still copy from.
    """
    offer = host_offer(checkout, variant)
    with _alone():
        if not even_if_current and built_from(client, variant) == hash_inputs(checkout, variant):
            return  # another process has built it meanwhile
        try:
            for part in ("cpu", "dev") if variant == "dev" else (variant,):
                _build_one(client, checkout, part, offer)
        finally:
            _remove_leftovers(client)


@contextmanager
def _alone() -> Iterator[None]:
    """Wait until no other process of this machine builds."""
    path = Path(tempfile.gettempdir()) / LOCK
    try:
        # Whoever comes first makes it, for everybody; others may open it though not make it anew.
        lock = os.open(path, os.O_RDONLY if path.exists() else os.O_RDONLY | os.O_CREAT, 0o666)
    except OSError as error:
        logger.debug("no lock %s: %s", path, error)
        yield
        return
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another build is running on this machine: waiting for its end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def host_offer(checkout: Path, variant: Variant) -> Offer:
    """What this machine's pip offers to a build."""
    return make_offer(
        read_pip_settings(),
        read_pins(checkout / "requirements"),
        build_arguments(variant)["VARIANT"],
    )


def _build_one(client: "APIClient", checkout: Path, variant: Variant, offer: Offer) -> None:
    name = IMAGES[variant]
    started = time.monotonic()
    with _context(input_files(checkout, variant), checkout, offer) as context:
        events = client.build(
            fileobj=context,
            custom_context=True,
            tag=name,
            target=TARGETS[variant],
            buildargs={**build_arguments(variant), **_proxies(os.environ)},
            labels={LABEL_INPUTS: hash_inputs(checkout, variant)},
            # As a run has it: an index or a proxy on the host's own address is reached from a build
            # too.
            network_mode="host",
            rm=True,
            forcerm=True,
            decode=True,
        )
        follow(name, events)
    logger.info("built %s in %.0f s", name, time.monotonic() - started)


def _proxies(env: Mapping[str, str]) -> dict[str, str]:
    names = [spelled for name in environment.PROXIES for spelled in (name, name.lower())]
    return {name: env[name] for name in names if env.get(name)}


def _remove_leftovers(client: "APIClient") -> None:
    """Remove the discarded stages, with their wheels and settings, and the images that lost their
    name.

    A later build therefore installs again; it is needed only when the inputs change, and then it
    must.
    """
    for label in (STAGE_LABEL, LABEL_INPUTS):
        for image in client.images(filters={"dangling": True, "label": label}):
            _remove_image(client, image["Id"])


def _remove_image(client: "APIClient", image: str) -> None:
    from docker.errors import APIError

    try:
        client.remove_image(image)
    except APIError as error:
        # In use by a container that still runs, or tagged by somebody: theirs to remove.
        logger.debug("left %s: %s", image, error)


@contextmanager
def _context(files: Iterable[Path], checkout: Path, offer: Offer) -> Iterator[io.BufferedRandom]:
    """The build context as a tar file: the allow-list of .dockerignore, with the offer in the place
    of .build/.
    """
    with tempfile.TemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for path in files:
                _add(tar, path.relative_to(checkout).as_posix(), path)
            for wheel in offer.wheels:
                _add(tar, f"{STAGED}/wheels/{wheel.name}", wheel)
            if offer.certificates is not None:
                _add(tar, f"{STAGED}/cert.pem", offer.certificates)
            if offer.config:
                content = offer.config.encode()
                info = tarfile.TarInfo(f"{STAGED}/pip.conf")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        file.seek(0)
        yield file


def _add(tar: tarfile.TarFile, name: str, path: Path) -> None:
    # No owner and one mode: the builder's cache must not depend on who checked out. (It ignores
    # times.)
    info = tarfile.TarInfo(name)
    info.size = path.stat().st_size
    info.mode = 0o755 if path.suffix == ".sh" else 0o644
    with path.open("rb") as content:
        tar.addfile(info, content)


def stage(checkout: Path, variant: Variant) -> Path:
    """Write .build/, from which `docker compose build` and `docker build` take what pip knows on
    this machine.
    """
    offer = host_offer(checkout, variant)
    folder = checkout / STAGED
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "wheels").mkdir(parents=True, mode=0o700)
    for wheel in offer.wheels:
        _link_or_copy(wheel, folder / "wheels" / wheel.name)
    if offer.config:
        config = folder / "pip.conf"
        config.touch(mode=0o600)  # An address may hold a password.
        config.write_text(offer.config)
    if offer.certificates is not None:
        shutil.copyfile(offer.certificates, folder / "cert.pem")
    return folder


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


class Progress(Protocol):
    """Where a build is shown."""

    def step(self, number: int, count: int, instruction: str) -> None:
        """A step begins."""

    def line(self, text: str) -> None:
        """A line of the current step's output."""


def follow(name: str, events: Iterable[Mapping[str, Any]]) -> None:
    """Show a build and see it through; a failure is an error with the last lines of the failing
    step.
    """
    last: deque[str] = deque(maxlen=LAST_LINES)
    step = "before the first step"
    with _progress(name) as progress:
        for event in events:
            if "error" in event:
                lines = "".join(f"\n    {line}" for line in last)
                # The step is named below, and shorter.
                cause = re.sub(r"^The command '.*' returned", "it returned", event["error"].strip())
                raise LauncherError(f"image {name} was not built: {cause}\n  at {step}{lines}")
            for text in _lines(event):
                if match := re.fullmatch(r"Step (\d+)/(\d+) : (.*)", text):
                    number, count, instruction = (
                        int(match.group(1)),
                        int(match.group(2)),
                        match.group(3),
                    )
                    step = f"step {number} of {count}: {_shorten(instruction)}"
                    last.clear()
                    progress.step(number, count, _shorten(instruction))
                else:
                    last.append(text)
                    progress.line(text)


def _lines(event: Mapping[str, Any]) -> list[str]:
    text = event.get("stream") or event.get("status") or ""
    # Colours of a step's stderr; a bar that redraws itself is shown as it last stood.
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(text))
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in plain.splitlines()]
    return [
        line for line in lines if line and not line.startswith((" ---> ", "Removing intermediate"))
    ]


def _shorten(instruction: str, width: int = 100) -> str:
    one_line = " ".join(instruction.split())
    return one_line if len(one_line) <= width else f"{one_line[: width - 1]}…"


@contextmanager
def _progress(name: str) -> Iterator[Progress]:
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _PlainProgress(name)
        return
    from rich.live import Live

    live = _LiveProgress(name)
    with Live(live, console=console, refresh_per_second=8, transient=True):
        yield live


class _PlainProgress:
    """Lines, for a log."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._started = time.monotonic()

    def step(self, number: int, count: int, instruction: str) -> None:
        elapsed = time.monotonic() - self._started
        logger.info(
            "%s: step %d of %d, %.0f s: %s", self._name, number, count, elapsed, instruction
        )

    def line(self, text: str) -> None:
        logger.info("    %s", text)


class _LiveProgress:
    """Two lines of a terminal, drawn again and again."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._started = time.monotonic()
        self._number, self._count, self._instruction, self._line = (
            0,
            0,
            "sending the build context",
            "",
        )

    def step(self, number: int, count: int, instruction: str) -> None:
        self._number, self._count, self._instruction, self._line = number, count, instruction, ""

    def line(self, text: str) -> None:
        self._line = text

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        where = f"step {self._number} of {self._count}" if self._count else "starting"
        head = Text(
            f"building {self._name}  {where}  {minutes}:{seconds:02d}  {self._instruction}", "bold"
        )
        body = Text(f"  {self._line}", "dim")
        for text in (head, body):
            text.no_wrap, text.overflow = True, "ellipsis"
        return Group(head, body)
