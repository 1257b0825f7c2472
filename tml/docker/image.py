"""The image: what goes into it, and whether the one that is there is current.

An image carries the hash of what went in (Dockerfile, requirements/, the C files of tml/native/,
arguments) as a label. While that agrees nothing is built and nothing is asked of a network.
build.py builds; it is imported only then.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from tml.docker.errors import LauncherError
from tml.docker.plan import IMAGES, Variant

if TYPE_CHECKING:
    from docker import APIClient

LABEL_INPUTS = "tml.image.inputs"
"""Hash of what went into the image."""
TARGETS: dict[Variant, str] = {"cpu": "runtime", "gpu": "runtime", "dev": "dev"}
"""Stage of the Dockerfile that each variant is."""


def input_files(checkout: Path, variant: Variant) -> list[Path]:
    """The files of the checkout that the image of `variant` is made of."""
    sets = {"cpu": ["cpu"], "gpu": ["gpu"], "dev": ["cpu", "export", "dev"]}[variant]
    names = ["install.sh", *(f"{name}.txt" for name in ("launcher", "train", *sets))]
    files = [checkout / "Dockerfile", *(checkout / "requirements" / name for name in names)]
    native = checkout / "tml" / "native"
    files += [native / "build.py", *sorted([*native.glob("*.c"), *native.glob("*.h")])]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise LauncherError(f"{missing[0]} is missing: {checkout} is not a whole checkout")
    return files


def build_arguments(variant: Variant) -> dict[str, str]:
    """The build arguments of a variant; dev is the cpu variant with the tests' tools."""
    return {"VARIANT": "gpu" if variant == "gpu" else "cpu"}


def hash_inputs(checkout: Path, variant: Variant) -> str:
    """Hash of everything that goes into the image of `variant`."""
    digest = hashlib.sha256()
    for file in input_files(checkout, variant):
        content = file.read_bytes()
        digest.update(
            f"{file.relative_to(checkout).as_posix()}\0{len(content)}\0".encode() + content
        )
    digest.update(json.dumps([TARGETS[variant], build_arguments(variant)], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def built_from(client: "APIClient", variant: Variant) -> str | None:
    """Hash that the image of `variant` is labelled with: "" where it has no such label, None where
    there is no image.
    """
    from docker.errors import ImageNotFound

    try:
        labels = client.inspect_image(IMAGES[variant])["Config"].get("Labels") or {}
    except ImageNotFound:
        return None
    return str(labels.get(LABEL_INPUTS, ""))
