"""On what terms the tests claim sessions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wake.queue import Terms


def terms(*agents: str, running: int = 0, most: int = 99, **more: Any) -> Mapping[str, Terms]:
    """Return the same terms for each of the agents; without limits unless `more` has some."""
    return dict.fromkeys(agents, Terms(running, most, **more))
