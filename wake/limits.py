"""What the operating system lets this process have."""

from __future__ import annotations

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
