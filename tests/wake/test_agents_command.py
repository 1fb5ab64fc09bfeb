"""`manage.py agents`: what it stores, what it shows and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command
from django.core.management.base import CommandError
from django.utils import timezone

from tests.claims import terms
from wake import configuration, queue
from wake.dispatch import Mode, WakeRequest, dispatch
from wake.heartbeats import presets
from wake.models import Agent, EventState, GatewaySettings, RunnerKind, SystemEvent
from wake.signing import new_signing_secret, signing_key

pytestmark = pytest.mark.django_db

MANAGE = Path(__file__).resolve().parents[2] / "manage.py"


def agents(*arguments: str, program: list[str] | None = None) -> str:
    """Run the command and return what it printed."""
    output = StringIO()
    options: dict[str, Any] = {} if program is None else {"program": program}
    call_command("agents", *arguments, stdout=output, **options)
    return output.getvalue()


def refusal(*arguments: str, program: list[str] | None = None) -> tuple[int, str]:
    """Run the command and return its exit status and its one line."""
    before = list(Agent.objects.order_by("pk").values())
    with pytest.raises(CommandError) as refused:
        agents(*arguments, program=program)
    assert list(Agent.objects.order_by("pk").values()) == before
    assert "\n" not in str(refused.value)
    return refused.value.returncode, str(refused.value)


def listed() -> dict[str, dict[str, Any]]:
    return {agent["id"]: agent for agent in json.loads(agents("--json"))}


def test_the_list_names_the_default_agent() -> None:
    heading, row = agents().splitlines()
    assert heading.split()[:4] == ["ID", "DEFAULT", "STATE", "RUNNER"]
    assert row.split() == ["main", "default", "enabled", "none", "30m", "0", "0", "0"]
    assert agents("list") == agents()
    assert json.loads(agents("list", "--json")) == json.loads(agents("--json"))


def test_an_agent_is_created_then_changed_and_the_rest_of_it_stays() -> None:
    assert agents("set", "ops", "--name", "Operations", "--every", "1h30m").startswith(
        "agent ops created: "
    )
    assert agents("set", "ops", "--timeout", "45", "--prompt", "").startswith("agent ops changed: ")
    agents("set", " OPS ", "--timeout", "10m", "--max-attempts", "3", "--pause")
    ops = Agent.objects.get(pk="ops")
    assert ops.name == "Operations"
    assert ops.heartbeat_every == timedelta(minutes=90)
    assert (ops.timeout_seconds, ops.max_attempts, ops.heartbeat_prompt) == (600, 3, "")
    assert (ops.enabled, ops.paused, ops.runner) == (True, True, "none")
    agents("set", "ops", "--resume", "--every", "off", "--disable")
    ops.refresh_from_db()
    assert (ops.enabled, ops.paused, ops.heartbeat_every) == (False, False, timedelta(0))
    assert listed()["ops"]["state"] == "disabled"
    assert listed()["ops"]["every"] == "off"


def test_a_program_is_stored_as_a_list_and_implies_its_runner() -> None:
    program = ["/bin/sh", "-c", "cat >> inbox.txt", "--runner", "http", ""]
    agents("set", "main", program=program)
    main = Agent.objects.get(pk="main")
    assert main.command == program
    assert main.runner == RunnerKind.COMMAND
    agents("set", "main", "--runner", "none")
    main.refresh_from_db()
    assert (main.runner, main.command) == ("none", program)


def test_a_preset_is_a_command_to_which_arguments_can_be_added(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    output = agents("set", "main", "--preset", "codex", program=["--model", "m 1"])
    main = Agent.objects.get(pk="main")
    assert main.runner == RunnerKind.COMMAND
    assert main.command == [*presets.find("codex").command, "--model", "m 1"]
    assert "runner command codex --model 'm 1'" in output
    assert "codex is not installed here" in output
    assert "codex --model" in agents()
    program = tmp_path / "claude"
    program.touch(0o755)
    assert "installed" not in agents("set", "main", "--preset", "claude-code")
    assert listed()["main"]["command"] == list(presets.find("claude-code").command)


def test_the_presets_are_listed() -> None:
    shown = agents("presets")
    as_json = json.loads(agents("presets", "--json"))
    assert [preset["id"] for preset in as_json] == [preset.key for preset in presets.PRESETS]
    for preset in presets.PRESETS:
        assert f"{preset.key}: {preset.title}" in shown
        assert preset.log_in in shown


def test_every_field_of_an_agent_can_be_set_shown_and_set_back() -> None:
    agents(
        *("set", "ops", "--url", "http://127.0.0.1:11434/v1", "--model", "qwen3:8b"),
        *("--key-variable", "OPENAI_API_KEY", "--transcript", "16k", "--active", "22:30-24:00"),
        *("--time-zone", "Europe/Berlin", "--idle-runs", "with-events", "--max-parallel", "2"),
        *("--max-per-minute", "off", "--max-self-wakes", "3"),
    )
    expected = {
        "runner": "chat",
        "url": "http://127.0.0.1:11434/v1",
        "model": "qwen3:8b",
        "keyVariable": "OPENAI_API_KEY",
        "transcriptBytes": 16 * 1024,
        "active": "22:30-00:00",
        "timeZone": "Europe/Berlin",
        "idleRuns": "with-events",
        "maxParallel": 2,
        "maxPerMinute": None,
        "maxSelfWakes": 3,
        "replyUrl": "",
    }
    assert {name: listed()["ops"][name] for name in expected} == expected
    assert "qwen3:8b at http://127.0.0.1:11434/v1" in agents()
    agents(
        *("set", "ops", "--key-variable", "off", "--active", "OFF", "--max-parallel", "off"),
        *("--max-per-minute", "20", "--max-self-wakes", "off", "--transcript", "0"),
    )
    ops = listed()["ops"]
    assert (ops["keyVariable"], ops["active"], ops["transcriptBytes"]) == ("", "off", 0)
    assert (ops["maxParallel"], ops["maxPerMinute"], ops["maxSelfWakes"]) == (None, 20, None)
    assert (ops["timeZone"], ops["idleRuns"]) == ("Europe/Berlin", "with-events")


@pytest.mark.parametrize(
    ("runner", "target"),
    [
        (("--runner", "inbox"), ""),
        (
            ("--runner", "openclaw", "--url", "wss://u:pw@other.example/?t=hid"),
            "wss://other.example/",
        ),
        (("--runner", "chat", "--url", "http://u:pw@llm/v1", "--model", "m"), "m at http://llm/v1"),
    ],
)
def test_each_runner_shows_its_target(runner: tuple[str, ...], target: str) -> None:
    output = agents("set", "ops", *runner) + agents() + agents("--json")
    assert Agent.objects.get(pk="ops").runner == runner[1]
    assert f"runner {runner[1]} {target}".rstrip() + ", every" in output
    assert "pw" not in output
    assert "hid" not in output
    assert "whsec_" not in output


def test_a_url_alone_goes_to_the_runner_that_has_one() -> None:
    agents("set", "ops", "--runner", "openclaw", "--url", "ws://other.example/")
    agents("set", "ops", "--url", "ws://another.example/")
    assert (listed()["ops"]["runner"], listed()["ops"]["url"]) == (
        "openclaw",
        "ws://another.example/",
    )
    agents("set", "ops", "--url", "http://127.0.0.1:8080/v1", "--model", "m")
    assert listed()["ops"]["runner"] == "chat"
    agents("set", "ops", "--runner", "inbox")
    agents("set", "ops", "--url", "http://127.0.0.1:8080/turn")
    assert listed()["ops"]["runner"] == "http"


def test_a_reply_url_gets_a_secret_too() -> None:
    url = "https://user:pass-word@log.example/replies"
    output = agents("set", "ops", "--reply-url", url)
    ops = Agent.objects.get(pk="ops")
    assert (ops.runner, ops.reply_url) == ("none", url)
    assert f"signing secret (shown only this once): {ops.signing_secret}" in output
    shown = agents("set", "ops", "--name", "Operations") + agents("--json")
    assert "whsec_" not in shown
    assert "pass-word" not in shown
    assert listed()["ops"]["replyUrl"] == "https://log.example/replies"
    agents("set", "ops", "--reply-url", "off")
    assert listed()["ops"]["replyUrl"] == ""


def test_an_http_agent_gets_a_secret_that_is_shown_once() -> None:
    output = agents("set", "ops", "--runner", "http", "--url", "https://agent.example/turns")
    shown = output.rsplit(" ", 1)[1].strip()
    assert len(signing_key(shown)) >= 24
    assert Agent.objects.get(pk="ops").signing_secret == shown
    again = agents("set", "ops", "--url", "https://agent.example/other")
    for output in (again, agents(), agents("--json")):
        assert "whsec_" not in output
    assert Agent.objects.get(pk="ops").signing_secret == shown


def test_a_given_secret_is_kept_and_not_shown() -> None:
    secret = new_signing_secret()
    output = agents("set", "ops", "--url", "https://agent.example/turns", "--secret", secret)
    assert secret not in output
    ops = Agent.objects.get(pk="ops")
    assert (ops.signing_secret, ops.runner) == (secret, RunnerKind.HTTP)


def test_credentials_in_a_url_are_not_shown() -> None:
    url = "https://user:pass-word@agent.example/turns?key=hidden"
    shown = agents("set", "ops", "--url", url) + agents() + agents("--json")
    assert Agent.objects.get(pk="ops").url == url
    assert "https://agent.example/turns" in shown
    assert "pass-word" not in shown
    assert "hidden" not in shown


def test_another_agent_can_be_made_the_default() -> None:
    assert "agent ops is the default agent" in agents("set", "ops", "--default")
    assert GatewaySettings.objects.get().default_agent_id == "ops"
    assert [agent["id"] for agent in listed().values() if agent["default"]] == ["ops"]
    assert configuration.gateway().default_agent == "ops"
    agents("set", "main", "--disable")
    assert not Agent.objects.get(pk="main").enabled


def test_the_default_agent_cannot_be_disabled() -> None:
    status, reason = refusal("set", "main", "--disable")
    assert (status, "default agent" in reason) == (1, True)
    status, reason = refusal("set", "ops", "--default", "--disable")
    assert (status, "default agent" in reason) == (1, True)
    assert GatewaySettings.objects.get().default_agent_id == "main"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("set", "no spaces"), "id: "),
        (("set", "x" * 65), "id: "),
        (("set", "x", "--runner", "http"), "url: The http runner needs a URL"),
        (("set", "x", "--runner", "command"), "-- PROGRAM ARGS"),
        (("set", "x", "--url", "nonsense"), "url: "),
        (("set", "x", "--timeout", "0"), "timeout_seconds: "),
        (("set", "x", "--max-attempts", "0"), "max_attempts: "),
        (("set", "x", "--every", "9999d"), "heartbeat_every: "),
        (("set", "x", "--name", "n" * 201), "name: "),
        (("set", "x", "--prompt", "\udcff"), "not valid UTF-8"),
        (("set", "x", "--time-zone", "Europe/Atlantis"), "time_zone: "),
        (("set", "x", "--time-zone", "../../etc/passwd"), "time_zone: "),
        (("set", "x", "--time-zone", ""), "time_zone: "),
        (("set", "x", "--active", "08:00-08:00"), "active_until: "),
        (("set", "x", "--active", "00:00-24:00"), "active_until: "),
        (("set", "x", "--key-variable", "SECRET_KEY"), "AGENT_KEY_VARIABLES"),
        (("set", "x", "--runner", "openclaw"), "url: The openclaw runner needs a URL"),
        (("set", "x", "--runner", "chat", "--url", "http://llm/v1"), "model: "),
        (("set", "x", "--model", "m"), "url: The chat runner needs a URL"),
        (("set", "x", "--model", "m", "--url", "ws://llm/v1"), "url: "),
        (("set", "x", "--url", "wss://other.example/"), "url: "),
        (("set", "x", "--runner", "openclaw", "--url", "ftp://other.example/"), "url: "),
        (("set", "x", "--reply-url", "ws://log.example/"), "reply_url: "),
        (("set", "x", "--transcript", "17m"), "transcript_bytes: "),
        (("set", "x", "--max-parallel", "0"), "max_parallel_runs: "),
        (("set", "x", "--max-per-minute", "1001"), "max_runs_per_minute: "),
        (("set", "x", "--max-self-wakes", "-1"), "max_self_wakes: "),
    ],
)
def test_what_cannot_be_is_refused(arguments: tuple[str, ...], reason: str) -> None:
    status, line = refusal(*arguments)
    assert status == 1
    assert reason in line


@pytest.mark.parametrize(
    ("arguments", "program"),
    [
        (("set",), None),
        (("set", "x", "--every", "30"), None),
        (("set", "x", "--timeout", "soon"), None),
        (("set", "x", "--runner", "carrier-pigeon"), None),
        (("set", "x", "--secret", "whsec_short"), None),
        (("set", "x", "--enable", "--disable"), None),
        (("set", "x", "--pause", "--resume"), None),
        (("set", "x", "y"), None),
        (("set", "x", "--preset", "skynet"), None),
        (("set", "x", "--active", "8-22"), None),
        (("set", "x", "--active", "08:00-24:01"), None),
        (("set", "x", "--active", "24:00-08:00"), None),
        (("set", "x", "--transcript", "much"), None),
        (("set", "x", "--transcript", "-1"), None),
        (("set", "x", "--max-parallel", "few"), None),
        (("set", "x", "--idle-runs", "never"), None),
        (("remove", "x"), None),
    ],
)
def test_wrong_usage_is_refused(arguments: tuple[str, ...], program: list[str] | None) -> None:
    refusal(*arguments, program=program)


@pytest.mark.parametrize(
    ("arguments", "program"),
    [
        (("set", "x"), []),
        (("set", "x", "--runner", "none"), ["/bin/true"]),
        (("set", "x", "--runner", "command", "--url", "https://agent.example/"), None),
        (("set", "x", "--url", "https://agent.example/"), ["/bin/true"]),
        (("list",), ["/bin/true"]),
        (("presets",), ["/bin/true"]),
        (("set", "x", "--preset", "codex", "--runner", "http"), None),
        (("set", "x", "--preset", "codex"), []),
        (("set", "x", "--runner", "inbox", "--url", "https://agent.example/"), None),
        (("set", "x", "--runner", "http", "--model", "m"), None),
        (("set", "x", "--model", "m"), ["/bin/true"]),
        ((), ["/bin/true"]),
    ],
)
def test_a_target_of_another_runner_is_wrong_usage(
    arguments: tuple[str, ...], program: list[str] | None
) -> None:
    assert refusal(*arguments, program=program)[0] == 2


def test_the_list_counts_what_waits_is_due_and_is_dead() -> None:
    agents("set", "ops", "--every", "30m")
    for text, key in (("a", "x"), ("b", "x"), ("c", "y")):
        dispatch(WakeRequest(text, "cli", session_key=key, agent_id="ops"))
    dispatch(WakeRequest("later", "cli", Mode.NEXT_HEARTBEAT, agent_id="ops"))
    dispatch(WakeRequest("other", "cli", session_key="x"))
    counts = {name: (row["queued"], row["due"], row["dead"]) for name, row in listed().items()}
    assert counts == {"main": (1, 1, 0), "ops": (4, 2, 0)}

    now = timezone.now()
    lease = timedelta(seconds=15)
    [claim] = queue.claim(terms("ops"), limit=1, owner="test", now=now, lease=lease)
    queue.fail(claim, "no", now=now, max_attempts=8, permanent=True)
    counts = {name: (row["queued"], row["due"], row["dead"]) for name, row in listed().items()}
    assert counts["ops"] == (2, 1, 2)
    assert SystemEvent.objects.filter(state=EventState.DEAD).count() == 2


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of commands on a migrated database of their own."""
    database = tmp_path_factory.mktemp("agents") / "db.sqlite3"
    environment = {
        **os.environ,
        "DATABASE_URL": f"sqlite:///{database}",
        "SECRET_KEY": "only-for-tests",
    }
    subprocess.run(
        [sys.executable, MANAGE, "migrate", "--verbosity", "0"], env=environment, check=True
    )
    return environment


def manage(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, MANAGE, *arguments], env=environment, capture_output=True, text=True
    )


def test_on_the_real_command_line_a_program_stands_behind_two_dashes(
    elsewhere: dict[str, str],
) -> None:
    program = ["/bin/sh", "-c", "cat >> inbox.txt", "--json", "--help", "--", "--settings=x"]
    changed = manage(elsewhere, "agents", "set", "main", "--runner", "command", "--", *program)
    assert (changed.returncode, changed.stderr) == (0, "")
    assert "agent main changed: " in changed.stdout
    [main] = json.loads(manage(elsewhere, "agents", "--json").stdout)
    assert (main["runner"], main["command"]) == ("command", program)


def test_exit_statuses_and_one_line_on_standard_error(elsewhere: dict[str, str]) -> None:
    refused = manage(elsewhere, "agents", "set", "x", "--runner", "http")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert len(refused.stderr.splitlines()) == 1
    assert manage(elsewhere, "agents", "set", "x", "--every", "3", "--").returncode == 2

    unprepared = {**elsewhere, "DATABASE_URL": elsewhere["DATABASE_URL"] + ".missing"}
    failed = manage(unprepared, "agents")
    assert failed.returncode == 1
    assert len(failed.stderr.splitlines()) == 1
    assert "is it migrated?" in failed.stderr
