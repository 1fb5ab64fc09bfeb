"""Presets: the commands of well-known agent programs, for the command runner. Pure, a table.

Each takes the prompt on standard input, without a person at hand, and prints the reply on standard
output. Arguments of one's own come last in all of them.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Preset:
    """A command to start from: `program` with its arguments, what it needs, and how to log in.

    `continues` says whether a session's heartbeats go on in one conversation; else each of them
    begins a new one. `hint` is what people want next: whole sentences, to be shown as they are.
    """

    key: str
    title: str
    program: str
    command: tuple[str, ...]
    continues: bool
    install: str
    log_in: str
    hint: str
    documentation: str


def find(key: str) -> Preset:
    """Return the preset called `key`. Raises KeyError."""
    return _by_key[key]


def command_in_words(command: Sequence[str]) -> str:
    """Return a command for people to read: `claude-code --model opus` where it is of a preset."""
    for preset in PRESETS:
        length = len(preset.command)
        if tuple(command[:length]) == preset.command:
            return shlex.join((preset.key, *command[length:]))
    return shlex.join(command)


def _in_one_conversation(program: str) -> tuple[str, ...]:
    """Return the command of a program that resumes the conversation of an id, or begins it.

    It refuses to resume one that is not there, and to begin one that is, before it does anything
    else: so a turn that fails half-way is not taken a second time, in a new conversation. What a
    failing try printed goes to standard error, where the reason of a failure is looked for.
    """
    script = (
        "prompt=$(cat); "
        f'ask() (reply=$(printf %s "$prompt" | {program} "$@") || '
        '{ status=$?; printf "%s\\n" "$reply" >&2; exit $status; }; printf "%s\\n" "$reply"); '
        'ask --resume "$0" "$@" || ask --session-id "$0" "$@"'
    )
    return ("sh", "-c", script, "{session_id}")


PRESETS: Final = (
    Preset(
        key="claude-code",
        title="Claude Code",
        program="claude",
        command=_in_one_conversation("claude -p"),
        continues=True,
        install="npm install -g @anthropic-ai/claude-code",
        log_in="Run claude and /login as the gateway's user, or set ANTHROPIC_API_KEY.",
        hint="Tools that ask first are denied: allow some, "
        '-- --permission-mode acceptEdits --allowedTools "Bash(git *)".',
        documentation="https://code.claude.com/docs/en/headless",
    ),
    Preset(
        key="codex",
        title="Codex CLI",
        program="codex",
        command=("codex", "exec", "--skip-git-repo-check", "--color", "never"),
        continues=False,
        install="npm install -g @openai/codex",
        log_in="Run codex login as the gateway's user, or set CODEX_API_KEY.",
        hint="It may only read: -- --sandbox workspace-write lets it change files, --cd DIR is "
        "where.",
        documentation="https://developers.openai.com/codex/noninteractive",
    ),
    Preset(
        key="opencode",
        title="OpenCode",
        program="opencode",
        command=("opencode", "run"),
        continues=False,
        install="npm install -g opencode-ai",
        log_in="Run opencode auth login as the gateway's user, or set the provider's key.",
        hint="-- --model PROVIDER/MODEL chooses a model, --dir DIR where it works.",
        documentation="https://opencode.ai/docs/cli/",
    ),
    Preset(
        key="gemini-cli",
        title="Gemini CLI",
        program="gemini",
        command=_in_one_conversation("gemini --skip-trust"),
        continues=True,
        install="npm install -g @google/gemini-cli",
        log_in="Run gemini and log in as the gateway's user, or set GEMINI_API_KEY.",
        hint="Tools that ask first are denied: -- --approval-mode auto_edit lets it change files.",
        documentation="https://geminicli.com/docs/cli/headless/",
    ),
)

_by_key: Final = {preset.key: preset for preset in PRESETS}
