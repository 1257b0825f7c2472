#!/usr/bin/env bash
# Make the checkout's virtual environment hold the pinned sets, and print its Python on stdout.
#
#   scripts/setup_venv.sh launcher        what python -m tml.docker needs (some seconds, no torch)
#   scripts/setup_venv.sh [cpu|gpu]       what training needs
#   scripts/setup_venv.sh [cpu|gpu] dev   and what the tests, ruff and mypy need
#
# One environment, .venv, grows as more is asked of it. A stamp per set holds the hash of requirements/, so a second
# call does nothing. TML_PYTHON chooses the Python it is made with.
set -euo pipefail
base=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$base/.venv
variant=${1:-cpu}; extra=${2:-}
say() { echo "setup_venv: $*" >&2; }
case "$variant $extra" in
  "launcher " | "cpu " | "gpu " | "cpu dev" | "gpu dev") ;;
  *) say "usage: setup_venv.sh [launcher|cpu|gpu] [dev]"; exit 2 ;;
esac

wanted=$(cat "$base"/requirements/* | sha256sum | cut -c1-16)
stamped() { [[ -x $venv/bin/python && $(cat "$venv/.tml-$1" 2>/dev/null) == "$wanted" ]]; }

find_python() {
  local candidate
  for candidate in ${TML_PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  say "no Python of 3.11 or later with the venv module found (looked for ${TML_PYTHON:-python3.11 to python3.13, python3});"
  say "install one (Debian: apt-get install python3.11-venv), or name it: TML_PYTHON=/path/to/python $0"
  return 1
}

# Compiled kernels, where they are missing or have changed. Without a C compiler torch does their work.
compile_kernels() { "$venv/bin/python" "$base/tml/native/build.py" "$venv/lib/tml" >&2 || true; }

if stamped "$variant" && { [[ -z $extra ]] || stamped "$extra"; }; then
  [[ $variant == launcher ]] || compile_kernels
  echo "$venv/bin/python"
  exit
fi
other=$([[ $variant == gpu ]] && echo cpu || echo gpu)
if [[ ! -x $venv/bin/python ]] || { [[ $variant != launcher && -e $venv/.tml-$other ]]; }; then
  python=$(find_python)
  say "making $venv with $python"
  "$python" -m venv --clear "$venv"
  # As in the image: the checkout is found wherever a script is called from.
  echo "$base" >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/tml.pth"
fi
say "installing the pinned set: $variant $extra (once; torch takes a minute or more)"
rm -f "$venv/.tml-$variant" "$venv/.tml-${extra:-none}"
PIP_QUIET=2 bash "$base/requirements/install.sh" "$venv/bin/python" "$variant" $extra >&2
[[ $variant == launcher ]] || compile_kernels
for set in launcher "$variant" $extra; do echo "$wanted" >"$venv/.tml-$set"; done
echo "$venv/bin/python"
