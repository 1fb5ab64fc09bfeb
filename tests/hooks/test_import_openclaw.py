"""`manage.py import_openclaw`: what it takes over, what it says, and what then answers requests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from datetime import time, timedelta
from io import StringIO
from pathlib import Path
from typing import Any
from uuid import UUID

import json5
import pytest
from django.core.management import CommandError, call_command
from django.db import DatabaseError
from django.db.models.signals import pre_save
from django.utils import timezone
from hypothesis import given, settings
from hypothesis import strategies as st

from hooks import presets
from hooks.models import AllowedSessionPrefix, HookMapping, HookPolicy, HookToken
from hooks.openclaw_import import AgentStep, read
from tests.hooks.conftest import Send
from wake.models import Agent, GatewaySettings, SystemEvent
from wake.tokens import digest, revoke

pytestmark = pytest.mark.django_db

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "openclaw.json5"
TOKEN = "the-token-that-the-senders-have"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENCLAW_HOOKS_TOKEN", TOKEN)
    monkeypatch.setenv("EMPTY", "")


def run(file: Path, *options: str) -> str:
    output = StringIO()
    call_command("import_openclaw", str(file), *options, stdout=output)
    return output.getvalue()


def report(file: Path, *options: str) -> dict[str, tuple[str, str]]:
    """Run the command and return the outcome and the why of each item."""
    items = json.loads(run(file, "--json", *options))["items"]
    lines = {item["what"]: (item["outcome"], item["why"]) for item in items}
    assert len(lines) == len(items), "an item is reported twice"
    return lines


Import = Callable[..., dict[str, tuple[str, str]]]


@pytest.fixture
def take(tmp_path: Path) -> Import:
    """Import a configuration given as Python values and return the report."""

    def take(*options: str, **configuration: Any) -> dict[str, tuple[str, str]]:
        file = tmp_path / "openclaw.json"
        file.write_text(json.dumps(configuration))
        return report(file, *options)

    return take


def stored() -> list[Any]:
    """Return every row that an import may write."""
    kinds = (Agent, GatewaySettings, HookPolicy, AllowedSessionPrefix, HookToken, HookMapping)
    allowed = list(HookPolicy.ensure().allowed_agents.order_by("pk").values_list("pk", flat=True))
    return [allowed, *(list(kind._default_manager.order_by("pk").values()) for kind in kinds)]


def last_event() -> SystemEvent:
    event = SystemEvent.objects.select_related("session").order_by("-pk").first()
    assert event
    return event


# --- The example ----------------------------------------------------------------------------------


def test_the_report_on_the_example_says_what_became_of_each_item() -> None:
    outcomes = {what: outcome for what, (outcome, _) in report(EXAMPLE).items()}
    expected = {
        "agent main": "unchanged",
        "agent ops": "taken",
        "agent ops: heartbeat.target": "left out",
        "agent archive": "taken",
        "default agent main": "unchanged",
        "agents.defaults.workspace": "left out",
        "session.scope": "unchanged",
        "session.mainKey": "unchanged",
        "session.dmScope": "left out",
        "hooks.enabled": "unchanged",
        "hooks.path": "taken",
        "prefix hook:": "taken",
        "hooks.allowRequestSessionKey": "taken",
        "hooks.defaultSessionKey": "taken",
        "hooks.allowedAgentIds": "taken",
        "hooks.maxBodyBytes": "changed",
        "hooks.token": "taken",
        "mapping builds": "taken",
        "mapping alerts": "taken",
        "mapping alerts: channel, to": "left out",
        "mapping alerts: model": "left out",
        "mapping shop": "changed",
        "mapping Gmail": "taken",
        "hooks.transformsDir": "left out",
        "hooks.gmail": "left out",
        "gateway.auth.token": "left out",
        "gateway, channels": "left out",
    }
    assert list(outcomes.items()) == list(expected.items())


def test_the_example_is_stored_whole() -> None:
    run(EXAMPLE)
    ops, archive = Agent.objects.get(pk="ops"), Agent.objects.get(pk="archive")
    assert (ops.name, ops.runner, ops.heartbeat_every) == ("Operations", "none", timedelta(hours=1))
    assert ops.heartbeat_prompt.startswith("Look at the alerts above.")
    assert (ops.active_from, ops.active_until) == (time(8), time(0))
    assert ops.time_zone == "Europe/Berlin"
    assert archive.heartbeat_every == timedelta(0)
    policy = HookPolicy.ensure()
    assert (policy.base_path, policy.max_body_bytes) == ("/incoming", 16 * 1024 * 1024)
    assert policy.default_session_key == "hook:ingress"
    assert set(policy.allowed_agents.values_list("pk", flat=True)) == {"main", "ops"}
    alerts = HookMapping.objects.get(name="alerts")
    assert (alerts.match_path, alerts.match_source, alerts.agent_id) == ("alerts", "monitor", "ops")
    assert (alerts.action, alerts.mode, alerts.deliver) == ("agent", "next-heartbeat", False)
    assert (alerts.text_template, alerts.timeout_seconds) == ("{{title}} on {{host}}", 120)
    assert [
        (mapping.name, mapping.position, mapping.enabled) for mapping in HookMapping.objects.all()
    ] == [("builds", 1, True), ("alerts", 2, True), ("shop", 3, False), ("Gmail", 4, True)]


def test_a_second_run_changes_nothing_and_says_so() -> None:
    first, before = run(EXAMPLE), stored()
    second = run(EXAMPLE)
    assert stored() == before
    assert "Nothing changed." in second
    assert "Nothing changed." not in first
    assert {outcome for outcome, _ in report(EXAMPLE).values()} == {"unchanged", "left out"}


def test_a_dry_run_prints_the_same_and_stores_nothing() -> None:
    before = stored()
    dry = run(EXAMPLE, "--dry-run")
    assert stored() == before
    assert dry == run(EXAMPLE) + "This was a dry run: nothing is stored.\n"


def test_an_import_that_fails_in_its_middle_leaves_nothing() -> None:
    def fail(**_: Any) -> None:
        raise DatabaseError("disk full")

    before = stored()
    pre_save.connect(fail, sender=HookMapping)
    try:
        with pytest.raises(CommandError, match="disk full"):
            run(EXAMPLE)
    finally:
        pre_save.disconnect(fail, sender=HookMapping)
    assert stored() == before


def test_the_token_is_kept_as_a_hash_and_never_printed() -> None:
    printed = run(EXAMPLE, "--dry-run") + run(EXAMPLE) + run(EXAMPLE, "--json")
    token = HookToken.objects.get(name="openclaw")
    assert token.digest == digest(TOKEN)
    for text in (printed, repr(stored()), repr(read({"hooks": {"token": TOKEN}}, {}))):
        assert TOKEN not in text
        assert TOKEN[:4] not in text.replace("the token", "")


def test_the_table_has_a_heading_and_a_line_for_each_item() -> None:
    heading, *lines = run(EXAMPLE).splitlines()
    assert heading.split() == ["WHAT", "OUTCOME", "WHY"]
    table = lines[: lines.index("")]
    assert len(table) == len(report(EXAMPLE))
    shop = next(line for line in table if line.startswith("mapping shop "))
    assert "  changed " in shop
    assert "shop.mjs" in shop


# --- The same requests get the same answers -------------------------------------------------------


@pytest.fixture
def deliver(send: Send) -> Callable[..., tuple[int, Any]]:
    """Import the example, then send with the senders' own token; return status and answer."""
    run(EXAMPLE)

    def deliver(path: str, body: Any, token: str = TOKEN) -> tuple[int, Any]:
        response = send(f"/incoming/{path}", body, token=token)
        is_json = response["Content-Type"].startswith("application/json")
        return response.status_code, json.loads(response.content) if is_json else None

    return deliver


Deliver = Callable[..., tuple[int, Any]]


def test_after_the_import_the_senders_token_opens_the_hooks_at_their_path(
    deliver: Deliver, send: Send
) -> None:
    status, answer = deliver("wake", {"text": "hello"})
    assert (status, answer["sessionKey"], answer["eventOutcome"]) == (
        200,
        "agent:main:main",
        "queued",
    )
    assert deliver("wake", {"text": "hello"}, token="another-token-of-this-length")[0] == 401
    assert send("/hooks/wake", {"text": "hello"}, token=TOKEN).status_code == 404


def test_after_the_import_a_request_may_choose_a_session_below_the_prefixes(
    deliver: Deliver,
) -> None:
    status, answer = deliver("wake", {"text": "hello", "sessionKey": "hook:mine"})
    assert (status, answer["sessionKey"]) == (200, "agent:main:hook:mine")
    status, answer = deliver("wake", {"text": "hello", "sessionKey": "discord:channel:1"})
    assert status == 400
    assert "starts with none of the allowed session prefixes" in answer["error"]


def test_after_the_import_hooks_reach_the_allowed_agents_alone(deliver: Deliver) -> None:
    assert deliver("wake", {"text": "hello", "agentId": "ops"})[0] == 200
    status, answer = deliver("wake", {"text": "hello", "agentId": "archive"})
    assert (status, "archive" in answer["error"]) == (400, True)


def test_after_the_import_a_mapping_fills_text_and_key_from_the_payload(deliver: Deliver) -> None:
    body = {"project": "Website", "id": 42, "status": "passed"}
    status, answer = deliver("ci", body)
    assert (status, answer["sessionKey"]) == (200, "agent:main:hook:ci:website")
    assert last_event().text == "Website: build 42 passed"
    assert deliver("ci", {"id": 42})[0] == 400


def test_after_the_import_a_turn_is_answered_with_its_run_id(deliver: Deliver) -> None:
    status, answer = deliver("agent", {"message": "Sum it up", "name": "Report"})
    event = last_event()
    assert (status, answer) == (200, {"ok": True, "runId": str(event.uid)})
    assert UUID(answer["runId"])
    assert (event.text, event.alone) == ("Sum it up", True)
    assert event.session.key == "agent:main:hook:ingress"
    assert deliver("agent", {"message": "x", "sessionKey": "dm:1"})[0] == 400
    assert deliver("agent", {"name": "no message"})[0] == 400


def test_after_the_import_a_mapping_to_an_agent_asks_for_a_turn(deliver: Deliver) -> None:
    status, answer = deliver("alerts", {"source": "monitor", "title": "Disk", "host": "db1"})
    event = last_event()
    assert (status, answer["runId"]) == (200, str(event.uid))
    assert (event.text, event.session.agent_id) == ("Disk on db1", "ops")
    assert deliver("alerts", {"source": "elsewhere", "title": "Disk", "host": "db1"})[0] == 404


def test_after_the_import_each_mail_has_a_turn_of_its_own(deliver: Deliver) -> None:
    mails = [{"id": name, "from": f"{name}@example.com", "subject": "Hi"} for name in ("a", "b")]
    status, answer = deliver("gmail", {"messages": mails})
    assert status == 200
    assert len(answer["results"]) == 2
    keys = set(SystemEvent.objects.values_list("session__key", flat=True))
    assert keys == {"agent:main:hook:gmail:a", "agent:main:hook:gmail:b"}


def test_after_the_import_a_mapping_without_its_javascript_answers_nothing(
    deliver: Deliver,
) -> None:
    assert deliver("shop", {"order": 1})[0] == 404


def test_a_switch_that_is_off_in_the_file_turns_hooks_off(take: Import, send: Send) -> None:
    assert send(body={"text": "x"}).status_code == 200
    for hooks in ({"enabled": False}, {}):
        HookPolicy.objects.update(enabled=True)
        outcome, why = take(hooks=hooks)["hooks.enabled"]
        assert (outcome, why != "") == ("taken", True)
        assert send(body={"text": "x"}).status_code == 404


# --- Files that are none --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"{hooks: {\n  path: }}", ':2:9: Unexpected "}"'),
        (b"", ": Empty strings are not legal JSON5"),
        (b"{a: '\xff'}", ": not UTF-8 at byte 6"),
        (b"[1]", ": the file must be an object"),
        (b"{hooks: []}", ": hooks must be an object"),
        (b"{hooks: {mappings: {}}}", ": hooks.mappings must be a list"),
        (b"{hooks: {mappings: [1]}}", ": hooks.mappings[0] must be an object"),
        (b"{agents: {list: [7]}}", ": agents.list[0] must be an object"),
        (b"{session: 'global'}", ": session must be an object"),
        (b'{agents: {entries: {"a\\nb": 1}}}', ": agents.entries.a b must be an object"),
        (b'{a: ["\\ud800"]}', ": '\\ud800' is not text that can be stored"),
        (b'{"\\u0000": 1}', ": '\\x00' is not text that can be stored"),
        (b"[" * 5000, ": nested too deep"),
        (b"{a: " + b"9" * 5000 + b"}", ": Exceeds the limit"),
    ],
)
def test_a_malformed_file_is_refused_in_one_line_with_the_place(
    tmp_path: Path, content: bytes, fault: str
) -> None:
    file = tmp_path / "openclaw.json"
    file.write_bytes(content)
    before = stored()
    with pytest.raises(CommandError) as refused:
        run(file)
    assert str(refused.value).startswith(f"{file}{fault}")
    assert "\n" not in str(refused.value)
    assert refused.value.returncode == 1
    assert stored() == before


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    for file in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(CommandError, match=str(file)):
            run(file)


def test_the_exit_statuses_on_the_real_command_line(tmp_path: Path) -> None:
    def manage(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "DATABASE_URL": f"sqlite:///{tmp_path}/db", "SECRET_KEY": "x"}
        command = [sys.executable, str(ROOT / "manage.py"), "import_openclaw", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    refused = manage(str(tmp_path / "missing.json"))
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == f"CommandError: {tmp_path}/missing.json: No such file or directory\n"
    assert manage().returncode == 2


def test_comments_a_byte_order_mark_and_trailing_commas_are_json5(tmp_path: Path) -> None:
    file = tmp_path / "openclaw.json"
    file.write_bytes(b"\xef\xbb\xbf// mine\n{session: {mainKey: 'Front', /* yes */},}")
    assert report(file)["session.mainKey"][0] == "taken"
    assert GatewaySettings.ensure().main_key == "front"


# --- Agents and sessions --------------------------------------------------------------------------


def schedules(agents: dict[str, Any]) -> dict[str, timedelta | None]:
    """Return each agent's schedule that a file's `agents` asks for; None leaves it as it is."""
    steps = [step for step in read({"agents": agents}, {}) if isinstance(step, AgentStep)]
    every = [
        [field.value for field in step.fields if field.name == "heartbeat_every"] for step in steps
    ]
    return {step.id: next(iter(values), None) for step, values in zip(steps, every, strict=True)}


OFF = timedelta(0)
HOUR = timedelta(hours=1)
TWO = [{"id": "main"}, {"id": "ops"}]


@pytest.mark.parametrize(
    ("agents", "expected"),
    [
        # Nothing said: the default agent alone has a schedule.
        ({"list": TWO}, {"main": None, "ops": OFF}),
        ({"list": [{"id": "main"}, {"id": "ops", "default": True}]}, {"main": OFF, "ops": None}),
        # A heartbeat for all of them.
        ({"list": TWO, "defaults": {"heartbeat": {"every": "1h"}}}, {"main": HOUR, "ops": HOUR}),
        # An owner for it.
        (
            {"list": TWO, "defaults": {"heartbeat": {"every": "1h", "agentId": "ops"}}},
            {"main": OFF, "ops": HOUR},
        ),
        # One's own takes it from the others, and what it does not say is the default's.
        (
            {
                "list": [{"id": "main"}, {"id": "ops", "heartbeat": {"prompt": "x"}}],
                "defaults": {"heartbeat": {"every": "1h"}},
            },
            {"main": OFF, "ops": HOUR},
        ),
        ({"list": [{"id": "main", "heartbeat": {"every": "0m"}}]}, {"main": OFF}),
        # The newer shape, and no agent listed at all.
        (
            {"entries": {"main": {}, "ops": {"heartbeat": {"every": 60}}}},
            {"main": OFF, "ops": HOUR},
        ),
        ({"defaults": {"heartbeat": {"every": "1h"}}}, {"main": HOUR}),
        ({"defaults": {"workspace": "x"}}, {}),
    ],
)
def test_schedules_are_those_of_openclaw(
    agents: dict[str, Any], expected: dict[str, timedelta | None]
) -> None:
    assert schedules(agents) == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("30m", timedelta(minutes=30)),
        ("45s", timedelta(seconds=45)),
        ("1h30m", timedelta(minutes=90)),
        (" 1.5H ", timedelta(minutes=90)),
        ("2d", timedelta(days=2)),
        ("1500ms", timedelta(seconds=1.5)),
        ("15", timedelta(minutes=15)),
        (15, timedelta(minutes=15)),
        (0, OFF),
        ("often", None),
        ("5 minutes", None),
        ("-5m", None),
        ("1.2.3", None),
        ("9" * 400 + "d", None),
        (True, None),
        (float("inf"), None),
    ],
)
def test_durations_are_read_as_openclaw_reads_them(
    written: Any, expected: timedelta | None
) -> None:
    assert schedules({"list": [{"id": "main", "heartbeat": {"every": written}}]}) == {
        "main": expected
    }


def test_an_agents_own_prompt_goes_before_the_one_for_all(take: Import) -> None:
    listed = [{"id": "main", "heartbeat": {}}, {"id": "ops", "heartbeat": {"prompt": "Mine."}}]
    take(agents={"list": listed, "defaults": {"heartbeat": {"prompt": "Ours."}}})
    prompts = Agent.objects.order_by("pk").values_list("heartbeat_prompt", flat=True)
    assert list(prompts) == ["Ours.", "Mine."]


def hours_of(agents: dict[str, Any], environment: dict[str, str] | None = None) -> list[Any]:
    """Return the fields about hours of the first agent that a file's `agents` asks for."""
    steps = read({"agents": agents}, environment or {})
    first = next(step for step in steps if isinstance(step, AgentStep))
    values = {field.name: field.value for field in first.fields}
    return [values.get(name) for name in ("active_from", "active_until", "time_zone")]


def one_agent(hours: Any, **defaults: Any) -> dict[str, Any]:
    return {
        "list": [{"id": "main", "heartbeat": {"activeHours": hours}}],
        "defaults": defaults,
    }


NOTHING_SAID = [None, None, None]


@pytest.mark.parametrize(
    ("hours", "expected"),
    [
        ({"start": "08:00", "end": "22:30"}, [time(8), time(22, 30), "UTC"]),
        ({"start": "22:00", "end": "06:00"}, [time(22), time(6), "UTC"]),
        ({"start": "08:00", "end": "24:00"}, [time(8), time(0), "UTC"]),
        ({"start": "00:00", "end": "24:00"}, NOTHING_SAID),
        ({"start": "24:00", "end": "08:00"}, NOTHING_SAID),
        ({"start": "8", "end": "22:00"}, NOTHING_SAID),
        ({"start": "08:00", "end": "24:01"}, NOTHING_SAID),
        ({"start": 8, "end": 22}, NOTHING_SAID),
        ({"start": "08:00"}, NOTHING_SAID),
        ({"timezone": "Europe/Berlin"}, NOTHING_SAID),
        ({}, NOTHING_SAID),
        (None, NOTHING_SAID),
    ],
)
def test_active_hours_are_times_of_day(hours: Any, expected: list[Any]) -> None:
    assert hours_of(one_agent(hours)) == expected


@pytest.mark.parametrize(
    ("written", "user", "machine", "expected", "outcome"),
    [
        ("America/New_York", "Europe/Berlin", "", "America/New_York", "taken"),
        ("user", "Europe/Berlin", "Asia/Tokyo", "Europe/Berlin", "taken"),
        (None, "Europe/Berlin", "Asia/Tokyo", "Europe/Berlin", "taken"),
        ("local", "Europe/Berlin", ":Asia/Tokyo", "Asia/Tokyo", "changed"),
        ("local", "Europe/Berlin", "", "UTC", "changed"),
        (None, None, "CET-1CEST", "UTC", "changed"),
        ("Mars/Olympus", "Europe/Berlin", "", "Europe/Berlin", "taken"),
        (None, "Mars/Olympus", "", "UTC", "changed"),
    ],
)
def test_the_time_zone_of_active_hours_is_found_as_openclaw_finds_it(
    written: str | None,
    user: str | None,
    machine: str,
    expected: str,
    outcome: str,
    take: Import,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TZ", machine)
    hours = {"start": "08:00", "end": "22:00", "timezone": written}
    lines = take(agents=one_agent(hours, userTimezone=user))
    assert Agent.objects.get(pk="main").time_zone == expected
    assert lines["agent main"][0] == outcome
    if expected != written:
        assert f"active hours in {expected}" in lines["agent main"][1]
    faults = [what for what, (_, why) in lines.items() if why == "no such time zone"]
    assert faults == [
        what
        for what, name in (
            ("agent main: heartbeat.activeHours.timezone", written),
            ("agents.defaults.userTimezone", user),
        )
        if name == "Mars/Olympus"
    ]


def test_hours_that_are_none_are_left_out_with_the_reason(take: Import) -> None:
    lines = take(agents=one_agent({"start": "late", "end": "24:00", "days": ["mon"]}))
    assert "a time of day such as 08:00" in lines["agent main: heartbeat.activeHours.start"][1]
    assert lines["agent main: heartbeat.activeHours.days"][0] == "left out"
    assert Agent.objects.get(pk="main").active_until is None


def test_hours_that_never_come_turn_the_schedule_off(take: Import) -> None:
    lines = take(agents=one_agent({"start": "08:00", "end": "08:00"}))
    assert Agent.objects.get(pk="main").heartbeat_every == timedelta(0)
    assert "begin and end at the same time" in lines["agent main"][1]


def test_an_agents_own_hours_go_before_those_for_all(take: Import) -> None:
    ours = {"start": "08:00", "end": "22:00", "timezone": "Europe/Berlin"}
    mine = {"start": "10:00", "end": "11:00", "timezone": "Asia/Tokyo"}
    listed = [
        {"id": "main", "heartbeat": {}},
        {"id": "ops", "heartbeat": {"activeHours": mine, "timeoutSeconds": 45}},
    ]
    heartbeat = {"activeHours": ours, "timeoutSeconds": 90}
    configuration = {"list": listed, "defaults": {"heartbeat": heartbeat}}
    take(agents=configuration)
    fields = ("active_from", "time_zone", "timeout_seconds")
    assert list(Agent.objects.order_by("pk").values_list(*fields)) == [
        (time(8), "Europe/Berlin", 90),
        (time(10), "Asia/Tokyo", 45),
    ]
    again = take(agents=configuration)
    assert {again[f"agent {name}"][0] for name in ("main", "ops")} == {"unchanged"}


def test_what_has_no_place_says_why(take: Import) -> None:
    heartbeat = {
        "session": "x",
        "ackMaxChars": 10,
        "isolatedSession": True,
        "directPolicy": "block",
    }
    lines = take(agents={"list": [{"id": "main", "heartbeat": heartbeat}]})
    for key in heartbeat:
        outcome, why = lines[f"agent main: heartbeat.{key}"]
        assert outcome == "left out"
        assert why != "this gateway has no such setting"


def test_a_duration_that_is_none_is_left_out_with_the_reason(take: Import) -> None:
    lines = take(agents={"list": [{"id": "main", "heartbeat": {"every": "often"}}]})
    assert lines["agent main"][0] == "unchanged"
    assert lines["agent main: heartbeat.every"][0] == "left out"
    assert "write for example 30m" in lines["agent main: heartbeat.every"][1]
    lines = take(agents={"list": [{"id": "main", "heartbeat": {"every": "400d"}}]})
    assert "366 days" in lines["agent main: heartbeat.every"][1]
    assert Agent.objects.get(pk="main").heartbeat_every == timedelta(minutes=30)


@pytest.mark.parametrize(
    ("agents", "expected"),
    [
        ({"list": TWO}, "main"),
        ({"list": [{"id": "ops"}, {"id": "main"}]}, "ops"),
        ({"list": [{"id": "main"}, {"id": "ops", "default": True}]}, "ops"),
        ({"entries": {"main": {}, "ops": {"default": True}}}, "ops"),
        (
            {"entries": {"main": {}, "ops": {}}, "defaults": {"systemAgent": {"agentId": "ops"}}},
            "ops",
        ),
        ({"list": [{"id": "main"}], "defaults": {"systemAgent": {"agentId": "nobody"}}}, "main"),
    ],
)
def test_the_default_agent_is_that_of_openclaw(
    take: Import, agents: dict[str, Any], expected: str
) -> None:
    take(agents=agents)
    assert GatewaySettings.ensure().default_agent_id == expected


def test_an_agent_that_is_here_keeps_what_the_file_does_not_say(take: Import) -> None:
    Agent.objects.create(id="ops", runner="command", command=["/bin/true"], timeout_seconds=5)
    lines = take(agents={"list": [{"id": "ops", "name": "Operations", "tools": {}, "skills": []}]})
    ops = Agent.objects.get(pk="ops")
    assert (ops.name, ops.runner, ops.timeout_seconds) == ("Operations", "command", 5)
    assert lines["agent ops"] == ("taken", "")
    assert lines["agent ops: tools, skills"][0] == "left out"


def test_ids_become_what_openclaw_makes_of_them(take: Import) -> None:
    lines = take(
        agents={
            "list": [
                {"id": " OPS "},
                {"id": "my team!"},
                {"id": "_x"},
                {"id": "ops"},
                {"id": "???"},
                {"name": "none"},
                {"id": 7},
            ]
        }
    )
    assert set(Agent.objects.values_list("pk", flat=True)) == {"main", "ops", "my-team"}
    assert lines["agent ops"][0] == "taken"
    assert lines["agent my-team"][0] == "changed"
    assert lines["agent _x"][0] == "left out"
    assert lines["agents.list[3]"] == ("left out", "agent ops is listed twice")
    assert lines["agents.list[4]"] == ("left out", "it has no id")
    assert lines["agents.list[5]"] == ("left out", "it has no id")
    assert lines["agents.list[6]"] == ("left out", "it must be a string")


@pytest.mark.parametrize(
    ("scope", "expected"), [("global", "global"), ("per-sender", "per-agent"), ("x", "per-agent")]
)
def test_the_scope_is_global_or_per_agent(take: Import, scope: str, expected: str) -> None:
    GatewaySettings.objects.update(scope="per-agent" if expected == "global" else "global")
    assert take(session={"scope": scope})["session.scope"][0] == "taken"
    assert GatewaySettings.ensure().scope == expected


# --- The policy -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "expected"),
    [("/in/", "/in"), ("in/coming", "/in/coming"), ("/", None), ("/admin/x", None), ("/ö", None)],
)
def test_the_base_path_is_cleaned_or_left_out(
    take: Import, written: str, expected: str | None
) -> None:
    outcome, why = take(hooks={"path": written})["hooks.path"]
    assert HookPolicy.ensure().base_path == (expected or "/hooks")
    assert (outcome, why == "") == (("taken", True) if expected else ("left out", False))


@pytest.mark.parametrize(
    ("written", "expected", "outcome"),
    [
        (2048, 2048, "taken"),
        (2048.9, 2048, "taken"),
        (1, 1024, "changed"),
        (10**30, 16 * 1024 * 1024, "changed"),
        (0, 262144, "left out"),
        (-5, 262144, "left out"),
        ("1mb", 262144, "left out"),
        (True, 262144, "left out"),
        (float("nan"), 262144, "left out"),
    ],
)
def test_the_body_limit_is_kept_within_bounds(
    take: Import, written: Any, expected: int, outcome: str
) -> None:
    assert take(hooks={"maxBodyBytes": written})["hooks.maxBodyBytes"][0] == outcome
    assert HookPolicy.ensure().max_body_bytes == expected


@pytest.mark.parametrize(
    ("ids", "expected", "outcome"),
    [
        (["ops"], {"ops"}, "taken"),
        (["Ops", "nobody"], {"ops"}, "taken"),
        (["ops", "*"], set(), "unchanged"),
        # None at all, and none that is here: never all of them.
        ([], {"main"}, "changed"),
        (["nobody"], {"main"}, "changed"),
        ("ops", {"main"}, "changed"),
        (["ops", 7], {"main"}, "changed"),
        (["${UNSET}"], {"main"}, "changed"),
    ],
)
def test_allowed_agents_never_become_all_by_accident(
    take: Import, ids: Any, expected: set[str], outcome: str
) -> None:
    lines = take(agents={"list": TWO}, hooks={"allowedAgentIds": ids})
    allowed = set(HookPolicy.ensure().allowed_agents.values_list("pk", flat=True))
    assert (allowed, lines["hooks.allowedAgentIds"][0]) == (expected, outcome)


def test_an_agent_that_is_not_here_is_named_among_the_allowed(take: Import) -> None:
    lines = take(hooks={"allowedAgentIds": ["main", "nobody"]})
    assert lines["hooks.allowedAgentIds: nobody"] == ("left out", "no such agent")


def test_requests_choose_keys_without_prefixes_only_with_a_warning(take: Import) -> None:
    outcome, why = take(hooks={"allowRequestSessionKey": True})["hooks.allowRequestSessionKey"]
    assert (outcome, "every session" in why) == ("taken", True)


@pytest.mark.parametrize("prefixes", ["hook:", [7], ["${UNSET}"], ["p" * 201], [" "]])
def test_a_list_of_prefixes_that_cannot_be_taken_opens_nothing(take: Import, prefixes: Any) -> None:
    hooks = {"allowRequestSessionKey": True, "allowedSessionKeyPrefixes": prefixes}
    assert take(hooks=hooks)["hooks.allowRequestSessionKey"][0] == "left out"
    assert HookPolicy.ensure().allow_request_session_key is False


def test_prefixes_are_compared_in_lower_case_and_others_stay(take: Import) -> None:
    AllowedSessionPrefix.objects.create(prefix="Hook:")
    AllowedSessionPrefix.objects.create(prefix="mine:")
    lines = take(hooks={"allowedSessionKeyPrefixes": ["hook:", " CI: ", "ci:"]})
    assert (lines["prefix hook:"][0], lines["prefix ci:"][0]) == ("unchanged", "taken")
    stored_prefixes = set(AllowedSessionPrefix.objects.values_list("prefix", flat=True))
    assert stored_prefixes == {"Hook:", "mine:", "ci:"}


def test_what_nothing_here_corresponds_to_is_named(take: Import) -> None:
    lines = take(
        hooks={"sessionRetention": "24h", "internal": {}, "presets": ["gmail", "x"]}, tools={}
    )
    for what in ("hooks.sessionRetention", "hooks.internal", "preset x", "tools"):
        assert lines[what][0] == "left out"


def test_what_an_included_file_may_say_is_not_taken_for_missing(take: Import) -> None:
    for configuration in (
        {"hooks": {"$include": "./hooks.json5"}},
        {"$include": "./base.json5"},
    ):
        lines = take(**configuration)
        assert "hooks.enabled" not in lines
        assert "hooks.allowedAgentIds" not in lines
        [why] = [why for what, (_, why) in lines.items() if what.endswith("$include")]
        assert "included files are not read" in why
    assert HookPolicy.ensure().enabled is True


# --- The token ------------------------------------------------------------------------------------


def test_a_short_token_is_taken_with_a_warning(take: Import, send: Send) -> None:
    outcome, why = take(hooks={"enabled": True, "token": " 15-characters! "})["hooks.token"]
    assert (outcome, "easy to guess" in why) == ("taken", True)
    assert send(body={"text": "x"}, token="15-characters!").status_code == 200
    assert "easy to guess" not in take(hooks={"token": "16-characters-!!"})["hooks.token"][1]


@pytest.mark.parametrize(
    ("configuration", "token"),
    [
        ({"hooks": {"token": "${OPENCLAW_HOOKS_TOKEN}"}}, TOKEN),
        ({"hooks": {"token": "a-${MINE}-b"}, "env": {"MINE": "c"}}, "a-c-b"),
        ({"hooks": {"token": "a-${MINE}-b"}, "env": {"vars": {"MINE": "d"}}}, "a-d-b"),
        (
            {"hooks": {"token": "${OPENCLAW_HOOKS_TOKEN}"}, "env": {"OPENCLAW_HOOKS_TOKEN": "x"}},
            TOKEN,
        ),
        ({"hooks": {"token": "a-${EMPTY}"}, "env": {"EMPTY": "e"}}, "a-e"),
        ({"hooks": {"token": "$${MINE}-and-$HOME"}}, "${MINE}-and-$HOME"),
        ({"hooks": {"token": "${lower}"}}, "${lower}"),
    ],
)
def test_variables_stand_for_what_they_stand_for_in_openclaw(
    take: Import, configuration: dict[str, Any], token: str
) -> None:
    assert take(**configuration)["hooks.token"][0] == "taken"
    assert HookToken.objects.get(name="openclaw").digest == digest(token)


@pytest.mark.parametrize("value", [None, ""])
def test_a_token_whose_variable_is_not_set_is_left_out_by_name(
    take: Import, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("OPENCLAW_HOOKS_TOKEN")
    if value is not None:
        monkeypatch.setenv("OPENCLAW_HOOKS_TOKEN", value)
    outcome, why = take(hooks={"token": "${OPENCLAW_HOOKS_TOKEN}"})["hooks.token"]
    assert (outcome, why) == ("left out", "not set in the environment: OPENCLAW_HOOKS_TOKEN")
    assert not HookToken.objects.exists()


def test_a_new_token_in_the_file_replaces_the_one_before_it(take: Import, send: Send) -> None:
    take(hooks={"enabled": True, "token": "the-first-of-the-tokens"})
    assert (
        "no longer works"
        in take(hooks={"enabled": True, "token": "the-second-one"})["hooks.token"][1]
    )
    assert send(body={"text": "x"}, token="the-first-of-the-tokens").status_code == 401
    assert send(body={"text": "x"}, token="the-second-one").status_code == 200


def test_a_token_that_was_revoked_does_not_come_back(take: Import, send: Send) -> None:
    take(hooks={"enabled": True, "token": TOKEN})
    revoke(HookToken.objects.filter(name="openclaw"), timezone.now())
    for token in (TOKEN, "another-token-in-the-file"):
        assert take(hooks={"enabled": True, "token": token})["hooks.token"][0] == "left out"
        assert send(body={"text": "x"}, token=token).status_code == 401


def test_a_token_that_is_here_under_another_name_stays(take: Import) -> None:
    HookToken.objects.create(name="ci", digest=digest(TOKEN), hint="x")
    assert take(hooks={"token": TOKEN})["hooks.token"] == ("unchanged", 'it is "ci" here')


# --- Mappings -------------------------------------------------------------------------------------


def test_a_mapping_of_few_words_is_a_turn_now_on_every_path(take: Import) -> None:
    lines = take(hooks={"mappings": [{"messageTemplate": "{{a}}"}]})
    mapping = HookMapping.objects.get()
    assert lines["mapping mapping 1"] == ("taken", "")
    assert (mapping.action, mapping.mode, mapping.match_path) == ("agent", "now", "")
    assert (mapping.enabled, mapping.deliver, mapping.timeout_seconds) == (True, True, None)


def test_a_mapping_is_called_by_its_id_then_its_name_and_names_stay_apart(take: Import) -> None:
    names = [{"id": "a", "name": "A"}, {"name": "Mail"}, {"name": "Mail"}, {"name": "Mail 2"}]
    hooks = {"mappings": [{**name, "messageTemplate": "x"} for name in names]}
    lines = take(hooks=hooks)
    assert list(HookMapping.objects.values_list("name", flat=True)) == [
        "a",
        "Mail",
        "Mail 2",
        "Mail 2 2",
    ]
    assert lines["mapping Mail 2"][0] == "changed"
    assert {outcome for outcome, _ in take(hooks=hooks).values()} == {"unchanged", "left out"}


def test_the_preset_stands_behind_the_mappings_and_keeps_its_path(take: Import) -> None:
    mine = {"name": "Gmail", "match": {"path": "gmail"}, "messageTemplate": "mine"}
    hooks = {"allowRequestSessionKey": True, "presets": ["gmail"], "mappings": [mine]}
    take(hooks=hooks)
    own, preset = HookMapping.objects.all()
    assert (own.name, own.text_template) == ("Gmail", "mine")
    assert (preset.name, preset.match_path) == ("Gmail 2", "gmail")
    assert preset.text_template == presets.find("gmail").values["text_template"]
    assert {outcome for outcome, _ in take(hooks=hooks).values()} == {"unchanged", "left out"}


@pytest.mark.parametrize(
    ("mapping", "reason"),
    [
        ({"messageTemplate": "{{a"}, "{{ is never closed"),
        ({"messageTemplate": "{{a || b}}"}, "names no value"),
        ({"messageTemplate": "x", "sessionKey": "agent:x"}, "malformed session key"),
        ({}, "Write a text"),
        ({"textTemplate": "only for a wake"}, "Write a text"),
        ({"messageTemplate": 5}, "messageTemplate: it must be a string"),
        ({"messageTemplate": "x", "action": "send"}, "action: it must be one of wake, agent"),
        ({"messageTemplate": "x", "wakeMode": "soon"}, "wakeMode: it must be one of"),
        ({"messageTemplate": "x", "deliver": "no"}, "deliver: it must be true or false"),
        ({"messageTemplate": "x", "timeoutSeconds": -1}, "timeoutSeconds: it must be a number"),
        ({"messageTemplate": "x", "match": {"path": 1}}, "path: it must be a string"),
        ({"messageTemplate": "x", "sessionKey": "${UNSET}"}, "not set in the environment: UNSET"),
        ({"messageTemplate": "x", "transform": {"module": "a.mjs"}}, "a.mjs"),
        ({"transform": {}}, "JavaScript"),
    ],
)
def test_a_mapping_that_cannot_work_is_kept_disabled_with_the_reason(
    take: Import, mapping: dict[str, Any], reason: str
) -> None:
    outcome, why = take(hooks={"mappings": [{"id": "a", **mapping}]})["mapping a"]
    assert outcome == "changed"
    assert why.startswith("disabled: ")
    assert reason in why
    assert HookMapping.objects.get(name="a").enabled is False


def test_a_variable_that_is_not_set_can_still_be_seen_in_its_mapping(take: Import) -> None:
    take(hooks={"mappings": [{"id": "a", "messageTemplate": "x", "sessionKey": "hook:${UNSET}"}]})
    assert HookMapping.objects.get().session_key == "hook:${UNSET}"


@pytest.mark.parametrize(
    ("mapping", "reason"),
    [
        ({"id": "n" * 101}, "name: "),
        ({"match": {"path": "p" * 201}}, "match_path: "),
        ({"forEach": "a.b"}, "for_each: "),
        ({"match": {"path": "/wake/"}}, "wake is an endpoint"),
        ({"match": {"path": "agent"}}, "agent is an endpoint"),
    ],
)
def test_a_mapping_that_cannot_be_stored_is_left_out_with_the_reason(
    take: Import, mapping: dict[str, Any], reason: str
) -> None:
    name = mapping.get("id", "a")
    lines = take(hooks={"mappings": [{"id": name, "messageTemplate": "x", **mapping}]})
    outcome, why = lines[f"mapping {name}"]
    assert (outcome, reason in why) == ("left out", True)
    assert not HookMapping.objects.exists()


def test_a_turn_may_take_a_day_at_most(take: Import) -> None:
    mapping = {"id": "a", "messageTemplate": "x", "timeoutSeconds": 10**12}
    outcome, why = take(hooks={"mappings": [mapping]})["mapping a"]
    assert (outcome, "86400 s" in why) == ("changed", True)
    assert HookMapping.objects.get().timeout_seconds == 86400


def test_a_mapping_to_an_agent_that_is_not_here_goes_to_the_default_one(take: Import) -> None:
    mapping = {"id": "a", "messageTemplate": "x", "agentId": "nobody"}
    outcome, why = take(hooks={"mappings": [mapping]})["mapping a"]
    assert (outcome, "for the default agent" in why) == ("changed", True)
    assert HookMapping.objects.get().agent_id is None


def test_what_a_mapping_asks_for_beyond_sessions_is_named(take: Import) -> None:
    harmless = {"channel": "last", "allowUnsafeExternalContent": False}
    mappings = [
        {"id": "a", "messageTemplate": "x", **harmless},
        {
            "id": "b",
            "messageTemplate": "x",
            "textTemplate": "y",
            "channel": "discord",
            "thinking": "low",
            "allowUnsafeExternalContent": True,
            "sessionMode": "isolated",
            "colour": "red",
        },
    ]
    lines = take(hooks={"mappings": mappings})
    named = {what for what in lines if what.startswith("mapping")}
    assert named == {
        "mapping a",
        "mapping b",
        "mapping b: channel",
        "mapping b: thinking",
        "mapping b: textTemplate",
        "mapping b: allowUnsafeExternalContent",
        "mapping b: sessionMode",
        "mapping b: colour",
    }
    assert lines["mapping a"] == lines["mapping b"] == ("taken", "")


def test_a_template_key_that_the_policy_refuses_is_said(take: Import) -> None:
    mapping = {"id": "a", "messageTemplate": "x", "sessionKey": "hook:{{id}}"}
    assert "is a template" in take(hooks={"mappings": [mapping]})["mapping a"][1]
    allowed = take(hooks={"mappings": [mapping], "allowRequestSessionKey": True})
    assert allowed["mapping a"][1] == ""


def test_mappings_that_are_here_come_behind_those_of_the_file_in_their_order(
    take: Import,
) -> None:
    for position, name in enumerate(("first", "second", "third")):
        HookMapping.objects.create(name=name, position=position, text_template="x")
    mappings = [{"id": name, "messageTemplate": "x"} for name in ("a", "second", "b")]
    assert take(hooks={"mappings": mappings})["other mappings"][0] == "changed"
    names = list(HookMapping.objects.values_list("name", flat=True))
    assert names == ["a", "second", "b", "first", "third"]
    assert "other mappings" not in take(hooks={"mappings": mappings})


def test_what_an_operator_did_to_a_mapping_stays(take: Import) -> None:
    hooks = {
        "mappings": [
            {"id": "off", "messageTemplate": "x"},
            {"id": "script", "messageTemplate": "x", "transform": {"module": "a.mjs"}},
        ]
    }
    take(hooks=hooks)
    HookMapping.objects.filter(name="off").update(enabled=False)
    HookMapping.objects.filter(name="script").update(enabled=True, transform="github")
    before = stored()
    lines = take(hooks=hooks)
    assert lines["mapping off"] == ("unchanged", "it stays disabled")
    assert lines["mapping script"] == ("unchanged", "")
    assert stored() == before


# --- Whatever a file holds ------------------------------------------------------------------------


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the way to each value of a configuration, as keys and indexes."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    found = [((*place, key), item) for key, item in inner]
    return [way for way, _ in found] + [deep for way, item in found for deep in places(item, way)]


_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=300)
_values = st.recursive(
    _scalars | st.sampled_from(["${HOME}", "${UNSET}", "{{", "{{a}}", "global", "/", "1h", "*"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


_example = json5.loads(EXAMPLE.read_text())


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(places(_example)), _values)
def test_with_any_value_anywhere_the_example_is_reported_on_or_refused(
    tmp_path_factory: pytest.TempPathFactory, place: tuple[Any, ...], value: Any
) -> None:
    parent = configuration = deepcopy(_example)
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_text(json.dumps(configuration))
    try:
        printed = run(file, "--dry-run")
    except CommandError as refused:
        printed = str(refused)
        assert "\n" not in printed
    assert TOKEN not in printed
