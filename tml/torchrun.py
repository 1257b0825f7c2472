"""torchrun with a quiet end: the same program and flags, `python -m tml.torchrun … script.py …`.

torchrun reports a failed process with a traceback of its own, thirty lines behind the one that says
what is wrong, and always exits with 1. Here the processes speak for themselves and the exit status
is that of the first to fail: its own, or 128 + n when signal n ended it or stopped the job.
"""

import logging
import signal
import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun; returns the exit status."""
    # What they would say of a failure or a signal, the lines below and the processes themselves do.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run.run(run.parse_args(list(sys.argv[1:] if argv is None else argv)))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return int(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        print(f"error: process {rank} was ended by {name}", file=sys.stderr)
        return 128 - int(failure.exitcode)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main())
