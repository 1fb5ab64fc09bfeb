"""What an agent's runner reaches, as a person reads it."""

from __future__ import annotations

from wake.heartbeats.presets import command_in_words
from wake.models import RUNNERS_WITH_URL, Agent, RunnerKind
from wake.redaction import without_credentials


def target(agent: Agent) -> str:
    """Return a program, a URL or a model in one line, without credentials; empty for the others."""
    if agent.runner == RunnerKind.COMMAND:
        return " ".join(command_in_words(agent.command).split())
    if agent.runner not in RUNNERS_WITH_URL or not agent.url:
        return ""
    url = without_credentials(agent.url)
    return f"{agent.model} at {url}" if agent.runner == RunnerKind.CHAT else url
