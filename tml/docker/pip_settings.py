"""What the host's pip knows, made usable inside an image build: `Offer`.

pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, PIP_CERT and pip.conf)
decide where packages come from on the host. A build sees neither the host's folders nor its
configuration, so the build context carries: wheels of the pinned sets that lie in local find-links
folders, a pip.conf with the addresses, and the certificates. The Dockerfile copies them into a
stage that is thrown away.
"""

import ast
import logging
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

logger = logging.getLogger(__name__)

BUILD_FOLDER = "/build"
"""Where the Dockerfile puts the offer."""

# Settings that mean the same inside a build; find-links and cert are translated, all others are the
# host's own affair.
_TAKEN = (
    "index-url",
    "extra-index-url",
    "trusted-host",
    "no-index",
    "timeout",
    "default-timeout",
    "retries",
)


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What the host's pip offers to a build."""

    wheels: tuple[Path, ...] = ()
    config: str = field(default="", repr=False)
    """A pip.conf; an address in it may hold a password."""
    certificates: Path | None = None


def read_pip_settings(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """pip's merged settings by name (index-url); the environment wins, then [install], then
    [global].
    """
    settings: dict[str, str] = {}
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        capture_output=True,
        text=True,
        env=dict(env),
        check=False,
    )
    for section in ("global.", "install."):
        for line in listed.stdout.splitlines() if listed.returncode == 0 else ():
            name, _, value = line.partition("=")
            if name.startswith(section):
                settings[name.removeprefix(section)] = str(ast.literal_eval(value))
    for name in (*_TAKEN, "find-links", "cert"):
        given = env.get(f"PIP_{name.upper().replace('-', '_')}")
        if given:
            settings[name] = given
    return settings


def make_offer(settings: Mapping[str, str], pins: Sequence[str], variant: str) -> Offer:
    """What of `settings` a build of `variant` can use; `pins` are name==version."""
    lines = []
    for name in _TAKEN:
        values = settings.get(name, "").split()
        usable = [value for value in values if not value.startswith("file:")]
        for value in values:
            if value not in usable:
                logger.info(
                    "pip's %s %s is a folder of this machine that a build cannot reach: left out",
                    name,
                    value,
                )
        if usable:
            lines.append(_line(name, usable))
    folders, addresses = _split_links(settings.get("find-links", "").split())
    wheels = tuple(wheel for folder in folders for wheel in matching_wheels(folder, pins, variant))
    links = [f"{BUILD_FOLDER}/wheels"] * bool(wheels) + addresses
    if links:
        lines.append(_line("find-links", links))
    certificates = Path(settings["cert"]) if settings.get("cert") else None
    if certificates is not None and not certificates.is_file():
        logger.warning("pip's cert %s is not a file: left out", certificates)
        certificates = None
    return Offer(
        wheels=wheels,
        config="\n".join(["[global]", *lines, ""]) if lines else "",
        certificates=certificates,
    )


def _line(name: str, values: Sequence[str]) -> str:
    # pip.conf interpolates nothing, and takes several values one per line.
    return (
        f"{name} = {values[0]}"
        if len(values) == 1
        else f"{name} =\n" + "\n".join(f"    {v}" for v in values)
    )


def _split_links(links: Sequence[str]) -> tuple[list[Path], list[str]]:
    folders, addresses = [], []
    for link in links:
        parts = urlsplit(link)
        if parts.scheme in ("http", "https"):
            addresses.append(link)
            continue
        folder = Path(unquote(parts.path) if parts.scheme == "file" else link).expanduser()
        if folder.is_dir():
            folders.append(folder)
        else:
            logger.warning("pip's find-links %s is not a folder: left out", link)
    return folders, addresses


def matching_wheels(folder: Path, pins: Sequence[str], variant: str) -> list[Path]:
    """The wheels of `folder` that satisfy a pin; a build tag such as +cpu is not the CUDA
    variant's.
    """
    wanted = {
        (_normal(name), version) for name, _, version in (pin.partition("==") for pin in pins)
    }
    found = []
    for wheel in sorted(folder.glob("*.whl")):
        name, version, *_ = f"{wheel.name}--".split("-")
        public, _, build = version.partition("+")
        if (_normal(name), public) in wanted and not (variant == "gpu" and build == "cpu"):
            found.append(wheel)
    return found


def read_pins(folder: Path) -> list[str]:
    """The name==version lines of all requirement sets in `folder`."""
    lines = (
        line.strip()
        for file in sorted(folder.glob("*.txt"))
        for line in file.read_text().splitlines()
    )
    return [line for line in lines if re.fullmatch(r"[\w.-]+==\S+", line)]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
