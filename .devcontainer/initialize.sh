#!/usr/bin/env bash
# What the dev container needs of the host, before each of its starts: the mounts' sources and the image. Under a
# second while both are there.
set -euo pipefail
base=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
if [[ ${TML_DEVCONTAINER_USER:-dev} != root ]]; then
  why=
  if [[ $EUID == 0 && -O $base ]]; then why="the checkout belongs to root"; fi
  if docker info --format '{{.SecurityOptions}}' 2>/dev/null | grep -q name=rootless; then
    why="on a rootless engine the container's root is you"
  fi
  if [[ $why ]]; then
    echo "dev container: $why: its user dev can read the checkout and not write to it." >&2
    echo "dev container: to write, set TML_DEVCONTAINER_USER=root where the editor is started, and rebuild." >&2
  fi
fi
mkdir -p "$HOME/.config" "$HOME/tmp"
exec "$base/scripts/build_images.sh" --dev
