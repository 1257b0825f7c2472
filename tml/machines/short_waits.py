"""Imported before torch: its threads wait busily for each other for a quarter of a millisecond at
most, then sleep.

By default they look for milliseconds: on processors that other work wants too, a step of TwHIN took
six times as long. Never to look (OMP_WAIT_POLICY=PASSIVE) costs up to a fifth on an idle machine.
The C library of the threads reads its settings when torch is loaded, so this module acts on import;
what the caller has set stays.
"""

from tml.machines import environment

LOOKS = "5000"

if environment.get(environment.OMP_WAIT_POLICY) is None:
    environment.set_default(environment.GOMP_SPINCOUNT, LOOKS)
