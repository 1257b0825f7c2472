#!/usr/bin/env bash
# Build the images. Flags are those of `python -m tml.docker build`: --gpu, --dev, --force.
#
#   scripts/build_images.sh [FLAGS]       through the engine's classic builder, as `run` does it
#   scripts/build_images.sh --buildkit    local/torch through docker compose build; .build/ offers it the host's wheels
set -euo pipefail
base=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$base"
python=$(scripts/setup_venv.sh launcher)
if [[ ${1:-} != --buildkit ]]; then exec "$python" -m tml.docker build "$@"; fi
inputs=$("$python" -m tml.docker build --stage)
trap 'rm -rf .build' EXIT
TML_IMAGE_INPUTS=${inputs#*=} docker compose build
