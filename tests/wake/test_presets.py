"""The presets: real processes under the command runner, with stand-ins for the agent programs.

A stand-in takes the arguments that its program documents and refuses all others; what it does
about conversations is what the real one was seen to do.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wake.processes import is_alive
from tests.wake.turns import RUN_ID, command_turn
from wake.heartbeats.presets import PRESETS, Preset, command_in_words, find
from wake.heartbeats.runners import Delivered, Failed, Outcome, Turn
from wake.heartbeats.runners.command import CommandRunner, filled

# What all stand-ins begin with: strict arguments, no abbreviations, as in the programs themselves.
HEAD = f"""#!{sys.executable}
import argparse, json, os, pathlib, sys, time, uuid
parser = argparse.ArgumentParser(allow_abbrev=False)
home = pathlib.Path(os.environ["STAND_IN_HOME"])
"""

# Claude Code and Gemini CLI keep a conversation under an id: there is none to resume before the
# first turn, and none to begin after it.
CONVERSATIONS = """
known = parser.parse_args()
said = sys.stdin.read()
began = known.session_id or known.resume
place = home / f"{uuid.UUID(began)}.json" if began else None
if known.resume and not place.exists():
    sys.exit(f"No conversation found with session ID: {began}")
if known.session_id and place.exists():
    sys.exit(f"Error: Session ID {began} is already in use.")
turns = json.loads(place.read_text()) if known.resume else []
turns.append(said)
if place:
    place.write_text(json.dumps(turns))
if os.environ.get("STAND_IN_FAILS"):
    print("Not logged in \\u00b7 Please run /login")
    sys.exit(1)
if os.environ.get("STAND_IN_HANGS"):
    (home / "pid").write_text(f"{os.getpid()}\\n")
    time.sleep(60)
print(json.dumps({"turns": len(turns), "said": said, "model": known.model}))
"""

ONE_TURN = """
known = parser.parse_args()
print(f"\\033[0m> working in {known.directory}", file=sys.stderr)
print(json.dumps({"turns": 1, "said": sys.stdin.read(), "model": known.model}))
"""

STAND_INS = {
    "claude": """
parser.add_argument("-p", "--print", action="store_true", required=True)
parser.add_argument("--session-id")
parser.add_argument("-r", "--resume")
parser.add_argument("--model")
parser.add_argument("--permission-mode", choices=["acceptEdits", "default", "dontAsk", "plan"])
parser.add_argument("--allowedTools", "--allowed-tools", nargs="+")
parser.add_argument("--output-format", choices=["text", "json", "stream-json"])
"""
    + CONVERSATIONS,
    "gemini": """
parser.add_argument("--skip-trust", action="store_true", required=True)
parser.add_argument("--session-id")
parser.add_argument("-r", "--resume")
parser.add_argument("-m", "--model")
parser.add_argument("--approval-mode", choices=["default", "auto_edit", "yolo", "plan"])
parser.add_argument("-o", "--output-format", choices=["text", "json", "stream-json"])
"""
    + CONVERSATIONS,
    "codex": """
parser.add_argument("command", choices=["exec"])
parser.add_argument("--skip-git-repo-check", action="store_true")
parser.add_argument("--color", choices=["always", "never", "auto"])
parser.add_argument("-m", "--model")
parser.add_argument("-C", "--cd", dest="directory")
parser.add_argument("-s", "--sandbox", choices=["read-only", "workspace-write"])
"""
    + ONE_TURN,
    "opencode": """
parser.add_argument("command", choices=["run"])
parser.add_argument("-m", "--model")
parser.add_argument("--dir", dest="directory")
parser.add_argument("--format", choices=["default", "json"])
parser.add_argument("--agent")
"""
    + ONE_TURN,
}

PROMPT = "größer\n  $(touch /tmp/never) `id` %s \\n 'quoted' \"twice\"\n\n* the last line"
CONTINUING = [preset for preset in PRESETS if preset.continues]


@pytest.fixture(autouse=True)
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the stand-ins first on the PATH; return where they keep their conversations."""
    programs, home = tmp_path / "programs", tmp_path / "conversations"
    programs.mkdir()
    home.mkdir()
    for name, text in STAND_INS.items():
        program = programs / name
        program.write_text(HEAD + text)
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN_HOME", str(home))
    return home


def turn_of(preset: Preset, *extra: str, key: str = "main", prompt: str = PROMPT) -> Turn:
    turn = command_turn(*preset.command, *extra, prompt=prompt)
    return replace(turn, session_key=f"agent:main:{key}")


def run(turn: Turn) -> Outcome:
    return asyncio.run(CommandRunner().run(turn))


def reply_to(turn: Turn) -> dict[str, object]:
    outcome = run(turn)
    assert isinstance(outcome, Delivered), outcome
    reply: dict[str, object] = json.loads(outcome.reply)
    return reply


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.key)
def test_the_prompt_goes_in_the_reply_comes_out_and_arguments_of_ones_own_come_last(
    preset: Preset,
) -> None:
    reply = reply_to(turn_of(preset, "--model", "a model; exit 3"))
    assert reply == {"turns": 1, "said": PROMPT, "model": "a model; exit 3"}
    refused = run(turn_of(preset, "--no-such-option"))
    assert isinstance(refused, Failed)
    assert "unrecognized arguments: --no-such-option" in refused.error


@pytest.mark.parametrize(
    ("key", "extra"),
    [
        ("claude-code", ("--permission-mode", "acceptEdits", "--allowedTools", "Bash(git *)")),
        ("codex", ("--sandbox", "workspace-write", "--cd", "/")),
        ("opencode", ("--model", "provider/model", "--dir", "/")),
        ("gemini-cli", ("--approval-mode", "auto_edit")),
    ],
)
def test_the_arguments_that_a_hint_names_are_taken(key: str, extra: tuple[str, ...]) -> None:
    assert extra[0] in find(key).hint
    assert reply_to(turn_of(find(key), *extra))["turns"] == 1


@pytest.mark.parametrize("preset", CONTINUING, ids=lambda preset: preset.key)
def test_a_session_goes_on_in_one_conversation_and_another_has_its_own(preset: Preset) -> None:
    counts = [reply_to(turn_of(preset, key=key))["turns"] for key in ("hook:a", "hook:b", "hook:a")]
    assert counts == [1, 1, 2]


@pytest.mark.parametrize("preset", CONTINUING, ids=lambda preset: preset.key)
def test_a_failure_says_why_and_is_not_tried_again_in_a_new_conversation(
    preset: Preset, stand_ins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply_to(turn_of(preset))
    monkeypatch.setenv("STAND_IN_FAILS", "1")
    failed = run(turn_of(preset))
    assert isinstance(failed, Failed)
    assert failed.error.startswith("exit status 1: Not logged in · Please run /login")
    [conversation] = stand_ins.iterdir()
    assert len(json.loads(conversation.read_text())) == 2
    # So it is at the very first turn, too.
    first = run(turn_of(preset, key="hook:new"))
    assert isinstance(first, Failed)
    assert "Not logged in" in first.error


def test_a_turn_that_is_cut_short_leaves_no_program_behind(
    stand_ins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_HANGS", "1")

    written = stand_ins / "pid"

    async def cut_short() -> int:
        task = asyncio.create_task(CommandRunner().run(turn_of(find("claude-code"))))
        line = ""
        async with asyncio.timeout(10):
            while not line.endswith("\n"):
                await asyncio.sleep(0.02)
                line = written.read_text() if written.exists() else ""
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return int(line)

    pid = asyncio.run(cut_short())
    try:
        assert not is_alive(pid)
    finally:
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)


def test_a_long_prompt_arrives_whole() -> None:
    prompt = "x" * 200_000
    assert reply_to(turn_of(find("claude-code"), prompt=prompt))["said"] == prompt


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.key)
def test_a_program_that_is_missing_is_named(
    preset: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    outcome = run(turn_of(preset))
    assert isinstance(outcome, Failed)
    assert preset.program in outcome.error
    assert "not found" in outcome.error or "No such file" in outcome.error


# --- Placeholders ---------------------------------------------------------------------------------


def fill(*command: str, agent_id: str = "main", session_key: str = "agent:main:x") -> list[str]:
    return list(filled(command, agent_id=agent_id, session_key=session_key, run_id=RUN_ID))


def test_a_session_id_is_a_uuid_that_stays_the_sessions_own() -> None:
    [session_id] = fill("{session_id}")
    # Conversations are stored under it: it must not change from one version to the next.
    assert UUID(session_id) == UUID("1f5f30fb-acb1-5868-b366-97ab779e31e0")
    others = {
        fill("{session_id}", **other)[0]
        for other in (
            {"session_key": "agent:main:y"},
            {"session_key": "global"},
            {"session_key": "global", "agent_id": "ops"},
        )
    }
    assert len(others | {session_id}) == 4


def test_placeholders_are_filled_wherever_they_stand() -> None:
    [agent_id, run_id, both] = fill("{agent_id}", "--run={run_id}", "{agent_id}{agent_id}")
    assert (agent_id, run_id, both) == ("main", f"--run={RUN_ID}", "mainmain")


@pytest.mark.parametrize(
    "argument",
    [
        "{print}",
        "{print $1; session_id}",
        "${session_key}",
        "{session_key}",
        "{ session_id }",
        "{SESSION_ID}",
        "{}",
        "{0}",
        "{{x}}",
        "{session_id",
        '{"run_id": "{"}',
    ],
)
def test_other_braces_stay_as_they_are(argument: str) -> None:
    assert fill("awk", argument) == ["awk", argument]


@given(st.lists(st.text()))
def test_without_a_placeholder_nothing_changes(command: list[str]) -> None:
    if not any("_id}" in argument for argument in command):
        assert fill(*command) == command


# --- The table ------------------------------------------------------------------------------------


def test_a_command_of_a_preset_is_shown_by_its_name() -> None:
    for preset in PRESETS:
        assert find(preset.key) is preset
        assert command_in_words(preset.command) == preset.key
        shown = command_in_words([*preset.command, "--model", "a b"])
        assert shown == f"{preset.key} --model 'a b'"
    assert command_in_words(["codex", "exec"]) == "codex exec"
    assert command_in_words(["/bin/echo", str(uuid := uuid4())]) == f"/bin/echo {uuid}"
    assert command_in_words([]) == ""
