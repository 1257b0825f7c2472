#!/usr/bin/env bash
# The dev container without an editor, by the command line of the dev containers' project, which needs node and npm.
# It is installed once, into ~/.cache/tml, at the version of package.json beside this.
#
#   .devcontainer/cli.sh up                         build what is missing, and start
#   .devcontainer/cli.sh exec python -m pytest -m "not docker"
#   .devcontainer/cli.sh exec bash                  a shell
#   .devcontainer/cli.sh remove                     the container, and the image that gave it your ids
#
# --id-label NAME=VALUE after the verb keeps a container apart from the editor's.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
base=$(dirname "$here")
verb=${1:-}; shift || true
case $verb in
  up | exec | read-configuration | remove) ;;
  *) echo "usage: cli.sh up|exec|read-configuration|remove [--id-label NAME=VALUE] [ARGS]" >&2; exit 2 ;;
esac

if [[ $verb == remove ]]; then
  label=devcontainer.local_folder=$base
  [[ ${1:-} != --id-label ]] || label=$2
  for container in $(docker ps --all --quiet --filter "label=$label"); do
    image=$(docker inspect --format '{{.Config.Image}}' "$container")
    docker rm --force "$container" >/dev/null
    # Kept while another container of the same folder needs it; the image it was made from is not touched.
    [[ $image != vsc-* ]] || docker rmi "$image" >/dev/null 2>&1 || true
  done
  exit
fi

version=$(sed -n 's/.*"@devcontainers\/cli": "\(.*\)".*/\1/p' "$here/package.json")
cli=${XDG_CACHE_HOME:-$HOME/.cache}/tml/devcontainers-cli-$version
if [[ ! -d $cli ]]; then
  command -v npm >/dev/null || { echo "cli.sh: npm is not here; install Node.js 20 or later" >&2; exit 1; }
  mkdir -p "$(dirname "$cli")"
  # Whole or not at all, also when two do this at once.
  partial=$(mktemp -d "$cli.XXXX")
  trap 'rm -rf "$partial"' EXIT
  npm install --prefix "$partial" --no-fund --no-audit --loglevel=error "@devcontainers/cli@$version" >&2
  [[ -d $cli ]] || mv "$partial" "$cli"
  rm -rf "$partial"
fi
exec "$cli/node_modules/.bin/devcontainer" "$verb" --workspace-folder "$base" "$@"
