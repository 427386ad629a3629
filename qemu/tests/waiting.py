# SPDX-License-Identifier: GPL-2.0-or-later
"""Waiting, as tests do it: for what is to happen, never for some time.

The machine that tests run on is not theirs alone: all that runs here may stand still for seconds. So what must happen is
waited for as long as this, what must not is looked for when it would have happened, and no test asserts that something
was fast by the clock: it asserts an order, a number, or the least that something may take.
"""

import time

PATIENCE = 90   # seconds, after which it will not happen any more


def wait_until(condition, what, pause=0.01):
    """Returns what the condition does, when that is true. `what` is said if it never is, or says it."""
    end = time.monotonic() + PATIENCE
    while True:
        over = time.monotonic() > end
        result = condition()
        if result:
            return result
        assert not over, what() if callable(what) else what
        time.sleep(pause)
