"""The keys of agents: in the environment, by a name that the settings allow, and nowhere else."""

from __future__ import annotations

import os

from django.conf import settings

from wake.errors import KeyUnavailable


def read_key(variable: str) -> str:
    """Return the key that this environment variable holds, or "" where the agent names none.

    Raises KeyUnavailable where it names one that may not be used, is not set, or cannot be sent in
    a header. That the variable may be used is looked at each time: the list of those that may can
    have become shorter since the agent was saved.
    """
    if not variable:
        return ""
    if variable not in settings.AGENT_KEY_VARIABLES:
        raise KeyUnavailable(f"{variable} is not in the setting AGENT_KEY_VARIABLES")
    key = os.environ.get(variable, "").strip()
    if not key:
        raise KeyUnavailable(f"the environment variable {variable} is not set or empty")
    if not (key.isascii() and key.isprintable()):
        raise KeyUnavailable(f"the environment variable {variable} does not hold a key")
    return key
