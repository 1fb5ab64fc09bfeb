"""What the operating system lets this process have, and what it does with it."""

from __future__ import annotations

import gc
import resource
from typing import Final

WANTED_OPEN_FILES: Final = 65_536


def raise_open_files_limit() -> None:
    """Let this process open as many files as it may ask for.

    Every connection and every running program takes some; the usual limit of 1,024 is low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_OPEN_FILES if hard == resource.RLIM_INFINITY else min(WANTED_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def settle_memory() -> None:
    """Look at what was made at the start no more, and seldom at the rest.

    The objects of Django and its models live as long as the process. Looking through them for
    garbage took a fifth of the time of a wake.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
