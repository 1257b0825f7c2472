"""Print one fact about where this process runs, for scripts.

python -m tml.machines.get_env tml_base      /home/me/tml
python -m tml.machines.get_env spec_type     chief
"""

import sys
from collections.abc import Callable, Sequence

from tml.machines import environment

FACTS: dict[str, Callable[[], object]] = {
    "tml_base": environment.tml_base,
    "spec_type": environment.spec_type,
    "rank": environment.rank,
    "local_rank": environment.local_rank,
    "world_size": environment.world_size,
    "local_world_size": environment.local_world_size,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the fact named by the one argument; exit status 2 where it is none of FACTS."""
    args = list(sys.argv[1:] if argv is None else argv)
    if len(args) != 1 or args[0] not in FACTS:
        print(f"usage: python -m tml.machines.get_env {'|'.join(FACTS)}", file=sys.stderr)
        return 2
    try:
        print(FACTS[args[0]]())
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
