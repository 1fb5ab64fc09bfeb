"""The admin's pages of the core, as a browser without scripts sees and forges them."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, time, timedelta
from typing import Any

import pytest
from django.apps import apps
from django.contrib.auth.models import User
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from hooks.configuration import hooks
from tests.admin_browser import (
    Response,
    assert_stored_nowhere,
    errors_of,
    page,
    said,
    signed_in,
)
from tests.claims import terms
from wake import configuration, dispatch, queue, tokens
from wake.dispatch import Mode, WakeRequest
from wake.heartbeats.presets import find
from wake.models import (
    Agent,
    DueReason,
    EventState,
    GatewaySettings,
    GatewayToken,
    Heartbeat,
    HeartbeatStatus,
    OperatorScope,
    PresenceEntry,
    ReplyPost,
    ReplyState,
    RunnerKind,
    Session,
    SystemEvent,
)

pytestmark = pytest.mark.django_db

LEASE = timedelta(seconds=15)
HOSTILE = "<script>alert('pwned')</script>"
# What is safe to find in a page: the hostile text after escaping.
ESCAPED = "&lt;script&gt;"


def act(client: Client, model: str, action: str, *keys: Any, **data: Any) -> Response:
    """Run an action of a list on these rows, and follow to the page after it."""
    return client.post(
        reverse(f"admin:wake_{model}_changelist"),
        {"action": action, "_selected_action": [str(key) for key in keys], **data},
        follow=True,
    )


def wake(
    text: str = "hello",
    key: str | None = "chat:1",
    *,
    agent: str | None = None,
    at: datetime | None = None,
    mode: Mode = Mode.NOW,
    source: str = "cli",
    external: bool = False,
) -> SystemEvent:
    """Store an event through the front door and return its row."""
    request = WakeRequest(text, source, mode, key, agent, external)
    receipt = dispatch.dispatch_batch([request], now=at)[0]
    assert isinstance(receipt, dispatch.Receipt), receipt
    return SystemEvent.objects.get(uid=receipt.event_id)


def claim(*agents: str) -> queue.Claim:
    return queue.claim(
        terms(*(agents or ("main",))),
        limit=1,
        owner="tests",
        now=timezone.now(),
        lease=LEASE,
    )[0]


def fail(*agents: str, permanent: bool = False, error: str = "exit status 3") -> None:
    """Let the next heartbeat of these agents fail."""
    now = timezone.now()
    queue.fail(claim(*agents), error, now=now, max_attempts=8, permanent=permanent)


def deliver(*agents: str, reply: str = "done", prompt: str = "do it") -> None:
    queue.settle(
        claim(*agents),
        HeartbeatStatus.DELIVERED,
        now=timezone.now(),
        prompt=prompt,
        reply=reply,
    )


def fail_to_post(error: str) -> ReplyPost:
    """Let the posting of the newest run's reply have failed."""
    now = timezone.now()
    return ReplyPost.objects.create(
        heartbeat=Heartbeat.objects.latest("pk"),
        state=ReplyState.FAILED,
        attempts=8,
        error=error,
        created_at=now,
        settled_at=now,
    )


def give_main_a_runner() -> None:
    agent = Agent.objects.get(pk="main")
    agent.runner, agent.command = RunnerKind.COMMAND, ["/bin/cat"]
    agent.save()


# --- Every page ---------------------------------------------------------------------------------


@pytest.fixture
def one_of_each() -> None:
    """A row of every model, with hostile text wherever text can come from outside."""
    wake(HOSTILE, f"chat:{HOSTILE.replace(' ', '')}", source=f"hook:{HOSTILE}", external=True)
    deliver(reply=HOSTILE, prompt=HOSTILE)
    fail_to_post(HOSTILE)
    wake(HOSTILE, "chat:2", source=HOSTILE)
    fail(error=HOSTILE, permanent=True)
    wake(HOSTILE, "chat:3")
    tokens.create(GatewayToken, HOSTILE, prefix="ocg_")
    Agent.objects.create(id="ops", name=HOSTILE, command=[HOSTILE], runner=RunnerKind.COMMAND)
    PresenceEntry.objects.create(
        key=HOSTILE, host=HOSTILE, text=HOSTILE, details={"x": HOSTILE}, seen_at=timezone.now()
    )


OUR_MODELS = [
    model for label in ("wake", "hooks") for model in apps.get_app_config(label).get_models()
]
# What has a page of its own is not all there is.
PARTS_OF_A_PAGE = {"AgentReach", "AgentTurn", "AllowedSessionPrefix", "IdempotencyKey", "Tally"}


@pytest.mark.parametrize(
    "model",
    [model for model in OUR_MODELS if model.__name__ not in PARTS_OF_A_PAGE],
    ids=lambda model: model.__name__,
)
def test_every_model_has_a_list_and_pages_on_which_hostile_text_is_only_text(
    model: Any, admin_client: Client, viewer: Client, one_of_each: None
) -> None:
    name = f"{model._meta.app_label}_{model._meta.model_name}"
    for client in (admin_client, viewer):
        response = client.get(reverse(f"admin:{name}_changelist"), follow=True)
        assert response.status_code == 200
        texts = [response.content.decode()]
        texts += [page(client, f"{name}_change", row.pk) for row in model._default_manager.all()]
        for text in texts:
            assert "<script>alert" not in text
    if model in (Session, SystemEvent, Heartbeat, ReplyPost, PresenceEntry):
        assert all(ESCAPED in text for text in texts)


def test_the_first_page_shows_how_things_stand(admin_client: Client, one_of_each: None) -> None:
    text = page(admin_client, "index")
    assert "<script>alert" not in text
    numbers = re.findall(r'wake-number-value">(\d+)<', text)
    assert numbers == ["1", "0", "0", "1"]  # queued, due (it is held), running, dead
    assert "1 more waits: held" in text
    assert "Events wait: agent main has no runner." in text
    give_main_a_runner()
    assert "Events wait" not in page(admin_client, "index")


def test_the_first_page_shows_nothing_of_sessions_to_those_who_may_not_see_them() -> None:
    wake("a secret text")
    deliver(reply="a secret reply")
    client = signed_in(User.objects.create_user("nobody", is_staff=True))
    text = page(client, "index")
    assert "secret" not in text
    assert "chat:1" not in text
    assert reverse("admin:wake_session_changelist") not in text


def test_only_staff_come_in(client: Client) -> None:
    client.force_login(User.objects.create_user("customer"))
    response = client.get(reverse("admin:wake_systemevent_changelist"))
    assert response.status_code == 302
    assert "/login/" in response["Location"]


# --- What nobody can do -------------------------------------------------------------------------


@pytest.mark.parametrize("model", [Session, SystemEvent, Heartbeat, ReplyPost, PresenceEntry])
def test_the_queue_is_read_only_even_for_a_superuser(
    model: Any, admin_client: Client, one_of_each: None
) -> None:
    name = f"admin:wake_{model._meta.model_name}"
    row = model._default_manager.first()
    before = list(model._default_manager.order_by("pk").values())
    assert admin_client.post(reverse(f"{name}_add"), {}).status_code == 403
    assert admin_client.get(reverse(f"{name}_add")).status_code == 403
    data = {"queued": 7, "state": "delivered", "text": "forged", "key": "forged", "reply": "x"}
    assert admin_client.post(reverse(f"{name}_change", args=[row.pk]), data).status_code == 403
    delete = reverse(f"{name}_delete", args=[row.pk])
    assert admin_client.post(delete, {"post": "yes"}).status_code == 403
    act(admin_client, model._meta.model_name, "delete_selected", row.pk, post="yes")
    assert list(model._default_manager.order_by("pk").values()) == before


@pytest.mark.parametrize(
    ("model", "action"),
    [
        ("session", "wake"),
        ("systemevent", "requeue"),
        ("systemevent", "discard"),
        ("replypost", "send_again"),
        ("agent", "pause"),
        ("agent", "resume"),
        ("agent", "make_signing_secret"),
        ("gatewaytoken", "revoke"),
        ("gatewaytoken", "rotate"),
    ],
)
def test_who_may_only_look_gets_no_action_that_changes(
    model: str, action: str, viewer: Client, one_of_each: None
) -> None:
    rows = apps.get_model("wake", model)._default_manager
    before = list(rows.order_by("pk").values())
    pages = [page(viewer, f"wake_{model}_changelist")]
    pages += [page(viewer, f"wake_{model}_change", row.pk) for row in rows.all()]
    assert not any(f'value="{action}"' in text for text in pages)
    act(viewer, model, action, *rows.values_list("pk", flat=True))
    assert list(rows.order_by("pk").values()) == before


# --- Sessions -----------------------------------------------------------------------------------


def test_waking_sessions_makes_them_due_and_says_what_holds_them(admin_client: Client) -> None:
    give_main_a_runner()
    event = wake("later", None, mode=Mode.NEXT_HEARTBEAT)
    due_already = wake("now", "chat:1").session
    held = wake("wait", "chat:2", agent=Agent.objects.create(id="ops").pk).session
    response = act(admin_client, "session", "wake", event.session_id, due_already.pk, held.pk)
    assert said(response) == [
        "1 session woken. 2 were due already.",
        "Held: agent ops has no runner; events wait.",
    ]
    session = Session.objects.get(pk=event.session_id)
    assert session.due_reason == DueReason.OPERATOR
    assert session.due_at is not None
    assert session.due_at <= timezone.now()


def test_a_button_on_a_sessions_page_wakes_it_and_leads_back(admin_client: Client) -> None:
    give_main_a_runner()
    event = wake("later", None, mode=Mode.NEXT_HEARTBEAT)
    text = page(admin_client, "wake_session_change", event.session_id)
    assert 'name="action"' in text
    assert "scheduled" in text
    response = act(admin_client, "session", "wake", event.session_id, stay="1")
    assert response.redirect_chain == [
        (reverse("admin:wake_session_change", args=[event.session_id]), 302)
    ]
    assert "Due since" in response.content.decode()


def test_a_sessions_page_says_in_sentences_how_it_stands(admin_client: Client) -> None:
    event = wake("an event's text", "chat:1")

    def text() -> str:
        return page(admin_client, "wake_session_change", event.session_id)

    assert "Held: agent main has no runner; its events wait." in text()
    give_main_a_runner()
    assert "Due since" in text()
    assert "an event&#x27;s text" in text()
    held = claim()
    assert "A heartbeat is running (attempt 1 of 8)." in text()
    queue.fail(held, "exit status 3", now=timezone.now(), max_attempts=8)
    assert "Backing off: attempt 1 of 8 failed" in text()
    assert "exit status 3" in text()
    Session.objects.update(due_at=timezone.now())
    fail(permanent=True)
    assert "1 dead letter: every attempt failed." in text()


@pytest.mark.parametrize(
    ("state", "key"),
    [
        ("running", "agent:main:running"),
        ("waiting", "agent:ops:waiting"),
        ("backing-off", "agent:main:backing-off"),
        ("due", "agent:main:due"),
        ("scheduled", "agent:main:main"),
        ("idle", "agent:main:idle"),
    ],
)
def test_the_list_of_sessions_filters_by_state(state: str, key: str, admin_client: Client) -> None:
    give_main_a_runner()
    wake(key="idle")
    deliver()
    wake(key="backing-off")
    fail()
    # However slow the machine, it still backs off when the page is shown.
    Session.objects.exclude(due_at=None).update(due_at=timezone.now() + timedelta(hours=1))
    wake(key="running")
    claim()
    wake(key="due")
    wake(key="waiting", agent=Agent.objects.create(id="ops").pk)
    wake(key=None, mode=Mode.NEXT_HEARTBEAT)
    response = admin_client.get(reverse("admin:wake_session_changelist"), {"state": state})
    assert [row.key for row in response.context["cl"].result_list] == [key]
    shown = page(admin_client, "wake_session_changelist", query=f"?state={state}")
    assert state.replace("-", " ") in shown


def test_the_list_of_sessions_searches_keys(admin_client: Client) -> None:
    wake(key="discord:channel:123")
    wake(key="slack:channel:456")
    response = admin_client.get(reverse("admin:wake_session_changelist"), {"q": "discord"})
    assert [row.key for row in response.context["cl"].result_list] == [
        "agent:main:discord:channel:123"
    ]


# --- Events -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "state", "message"),
    [
        ("requeue", EventState.QUEUED, "1 dead letter requeued."),
        ("discard", EventState.DISCARDED, "1 dead letter discarded."),
    ],
)
def test_dead_letters_are_requeued_or_discarded_and_others_left_alone(
    action: str, state: EventState, message: str, admin_client: Client
) -> None:
    dead = wake("dead")
    fail(permanent=True)
    queued = wake("queued")
    response = act(admin_client, "systemevent", action, dead.pk, queued.pk)
    assert said(response) == [message, "1 event was no dead letter and was left as is."]
    dead.refresh_from_db()
    queued.refresh_from_db()
    assert (dead.state, queued.state) == (state, EventState.QUEUED)
    session = Session.objects.get()
    assert session.queued == SystemEvent.objects.filter(state=EventState.QUEUED).count()
    history = page(admin_client, "wake_systemevent_history", dead.pk)
    assert f"{action}" in history.lower()


def test_more_dead_letters_than_a_statement_takes_parameters(admin_client: Client) -> None:
    wake("first")
    session = Session.objects.get()
    template = SystemEvent.objects.get()
    template.state = EventState.DEAD
    template.save()
    row = {"session": session, "text": "x", "source": "cli", "created_at": template.created_at}
    SystemEvent.objects.bulk_create(
        SystemEvent(uid=f"{number:032x}", state=EventState.DEAD, **row) for number in range(1, 2500)
    )
    Session.objects.update(queued=0)
    response = act(admin_client, "systemevent", "requeue", template.pk, select_across="1")
    assert said(response) == ["2,500 dead letters requeued."]
    assert Session.objects.get().queued == 2500


def test_buttons_for_dead_letters_stand_on_dead_letters_only(admin_client: Client) -> None:
    dead = wake("dead")
    fail(permanent=True)
    queued = wake("queued")
    assert 'value="requeue"' in page(admin_client, "wake_systemevent_change", dead.pk)
    assert 'value="requeue"' not in page(admin_client, "wake_systemevent_change", queued.pk)


@pytest.mark.parametrize(
    "find",
    [
        lambda event: "needle",
        lambda event: str(event.uid),
        lambda event: event.uid.hex,
        lambda event: "chat:needle",
    ],
    ids=["text", "event id", "event id without hyphens", "session key"],
)
def test_events_are_found(find: Callable[[SystemEvent], str], admin_client: Client) -> None:
    event = wake("a needle in it", "chat:needle")
    wake("hay", "chat:hay")
    response = admin_client.get(reverse("admin:wake_systemevent_changelist"), {"q": find(event)})
    assert [row.pk for row in response.context["cl"].result_list] == [event.pk]


@pytest.mark.parametrize(
    "query",
    [
        {"state__exact": "queued"},
        {"session__agent__id__exact": "ops"},
        {"door": "hook"},
        {"since": "hour"},
    ],
    ids=lambda query: next(iter(query)),
)
def test_events_are_filtered(query: dict[str, str], admin_client: Client) -> None:
    Agent.objects.create(id="ops")
    wake("old", "chat:1", at=datetime(2020, 1, 1, tzinfo=UTC))
    deliver()
    new = wake("new", "chat:2", agent="ops", source="hook:github")
    response = admin_client.get(reverse("admin:wake_systemevent_changelist"), query)
    assert [row.pk for row in response.context["cl"].result_list] == [new.pk]


def test_an_events_page_has_its_whole_text_and_its_heartbeat(admin_client: Client) -> None:
    event = wake("first line\n" + "x" * 5000 + "\nlast line", source="hook:gh", external=True)
    deliver()
    run = Heartbeat.objects.get()
    text = page(admin_client, "wake_systemevent_change", event.pk)
    assert "x" * 5000 + "\nlast line" in text
    assert reverse("admin:wake_heartbeat_change", args=[run.pk]) in text
    assert "external" in text
    assert "x" * 300 not in page(admin_client, "wake_systemevent_changelist")


# --- Heartbeats ---------------------------------------------------------------------------------


def test_a_heartbeats_page_has_prompt_reply_and_the_events_it_settled(
    admin_client: Client,
) -> None:
    event = wake("what happened")
    deliver(reply="line one\nline two", prompt="the whole prompt")
    run = Heartbeat.objects.get()
    text = page(admin_client, "wake_heartbeat_change", run.pk)
    for part in ("line one\nline two", "the whole prompt", "what happened", str(run.run_id)):
        assert part in text
    assert reverse("admin:wake_systemevent_change", args=[event.pk]) in text
    listed = page(admin_client, "wake_heartbeat_changelist", query=f"?q={run.run_id}")
    assert "line one" in listed
    assert "line two" not in listed


# --- Reply posts --------------------------------------------------------------------------------


def test_replies_that_failed_are_sent_again_and_others_left_alone(admin_client: Client) -> None:
    wake()
    deliver()
    failed = fail_to_post("no answer within 30 s")
    wake(key="chat:2")
    deliver()
    sent = fail_to_post("")
    ReplyPost.objects.filter(pk=sent.pk).update(state=ReplyState.SENT)
    assert 'value="send_again"' in page(admin_client, "wake_replypost_change", failed.pk)
    assert "no answer within 30 s" in page(admin_client, "wake_replypost_change", failed.pk)
    assert 'name="stay"' not in page(admin_client, "wake_replypost_change", sent.pk)

    response = act(admin_client, "replypost", "send_again", failed.pk, sent.pk)
    assert said(response) == [
        "1 reply will be sent again.",
        "1 reply had not failed and was left as is.",
    ]
    failed.refresh_from_db()
    assert (failed.state, failed.attempts) == (ReplyState.PENDING, 0)
    assert failed.due_at
    assert failed.due_at <= timezone.now()
    sent.refresh_from_db()
    assert sent.state == ReplyState.SENT


def test_the_list_of_reply_posts_finds_a_run(admin_client: Client) -> None:
    for key in ("chat:1", "chat:2"):
        wake(key=key)
        deliver()
        post = fail_to_post("")
    found = reverse("admin:wake_replypost_changelist")
    for searched in (str(post.heartbeat.run_id), "chat:2"):
        response = admin_client.get(found, {"q": searched})
        assert [row.pk for row in response.context["cl"].result_list] == [post.pk]


def test_a_heartbeats_page_says_what_came_of_posting_its_reply(admin_client: Client) -> None:
    wake()
    deliver()
    run = Heartbeat.objects.latest("pk")
    address = reverse("admin:wake_replypost_change", args=[run.pk])
    assert address not in page(admin_client, "wake_heartbeat_change", run.pk)
    fail_to_post("")
    assert address in page(admin_client, "wake_heartbeat_change", run.pk)


# --- Agents -------------------------------------------------------------------------------------


def agent_form(**changes: Any) -> dict[str, Any]:
    return {
        "id": "ops",
        "name": "Operations",
        "enabled": "on",
        "runner": "none",
        "url": "",
        "heartbeat_every": "30m",
        "heartbeat_prompt": "Look.",
        "timeout_seconds": "600",
        "max_attempts": "8",
        "time_zone": "UTC",
        "idle_runs": "always",
        "transcript_bytes": "65536",
        **changes,
    }


FORGED_COMMAND = {
    "command": '["/bin/sh", "-c", "touch /tmp/pwned"]',
    "command_line": '["/bin/sh"]',
    "form-0-command": '["/bin/sh"]',
    "form-TOTAL_FORMS": "1",
    "form-INITIAL_FORMS": "1",
    "form-0-id": "ops",
    "_save": "Save",
}


def test_a_command_cannot_be_set_by_adding_an_agent(admin_client: Client) -> None:
    url = reverse("admin:wake_agent_add")
    admin_client.post(url, agent_form(**FORGED_COMMAND))
    assert Agent.objects.get(pk="ops").command == []
    response = admin_client.post(url, agent_form(id="b", runner="command", **FORGED_COMMAND))
    assert "command line" in str(errors_of(response)["runner"])
    assert not Agent.objects.filter(pk="b").exists()


def test_a_command_cannot_be_changed_by_any_form(admin_client: Client) -> None:
    Agent.objects.create(id="ops", command=["/bin/cat"])
    form = agent_form(runner="command", **FORGED_COMMAND)
    response = admin_client.post(reverse("admin:wake_agent_change", args=["ops"]), form)
    assert response.status_code == 302
    admin_client.post(reverse("admin:wake_agent_changelist"), FORGED_COMMAND)
    agent = Agent.objects.get(pk="ops")
    assert agent.command == ["/bin/cat"]
    assert agent.runner == RunnerKind.COMMAND  # which is the operator's to choose
    text = page(admin_client, "wake_agent_change", "ops")
    assert "/bin/cat" in text
    assert "manage.py agents set ops --runner command" in text
    assert 'name="command"' not in text


def test_the_secret_of_an_http_agent_is_made_shown_once_and_never_again(
    admin_client: Client,
) -> None:
    form = agent_form(runner="http", url="http://127.0.0.1:9000/", signing_secret="whsec_forged")
    response = admin_client.post(reverse("admin:wake_agent_add"), form)
    secret = Agent.objects.get(pk="ops").signing_secret
    assert secret.startswith("whsec_")
    assert secret != "whsec_forged"
    assert secret in response.content.decode()
    assert_stored_nowhere(secret)
    change = reverse("admin:wake_agent_change", args=["ops"])
    for shown in (admin_client.get(change), admin_client.post(change, form, follow=True)):
        assert secret not in shown.content.decode()
    assert Agent.objects.get(pk="ops").signing_secret == secret
    response = act(admin_client, "agent", "make_signing_secret", "ops", stay="1")
    replaced = Agent.objects.get(pk="ops").signing_secret
    assert replaced != secret
    assert replaced in response.content.decode()


def test_a_new_secret_is_made_for_one_agent_at_a_time(admin_client: Client) -> None:
    Agent.objects.create(id="ops", signing_secret="whsec_old")
    act(admin_client, "agent", "make_signing_secret", "ops", "main")
    assert Agent.objects.get(pk="ops").signing_secret == "whsec_old"


def test_a_reply_url_gets_a_secret_too(admin_client: Client) -> None:
    form = agent_form(reply_url="https://log.example/replies")
    response = admin_client.post(reverse("admin:wake_agent_add"), form)
    secret = Agent.objects.get(pk="ops").signing_secret
    assert secret.startswith("whsec_")
    assert secret in response.content.decode()
    assert "New signing secret" in page(admin_client, "wake_agent_change", "ops")
    assert "New signing secret" not in page(admin_client, "wake_agent_change", "main")


def test_every_new_field_is_on_the_form(admin_client: Client) -> None:
    form = agent_form(
        runner="chat",
        url="http://u:pass-word@127.0.0.1:11434/v1",
        model="qwen3:8b",
        key_variable="OPENAI_API_KEY",
        transcript_bytes="1000",
        active_from="22:30",
        active_until="24:00",
        time_zone="Europe/Berlin",
        idle_runs="with-events",
        max_parallel_runs="2",
        max_runs_per_minute="",
        max_self_wakes="3",
    )
    admin_client.post(reverse("admin:wake_agent_add"), form)
    ops = Agent.objects.get(pk="ops")
    assert (ops.runner, ops.model, ops.key_variable) == ("chat", "qwen3:8b", "OPENAI_API_KEY")
    assert (ops.active_from, ops.active_until) == (time(22, 30), time(0))
    assert (ops.time_zone, ops.idle_runs, ops.transcript_bytes) == (
        "Europe/Berlin",
        "with-events",
        1000,
    )
    assert (ops.max_parallel_runs, ops.max_runs_per_minute, ops.max_self_wakes) == (2, None, 3)
    shown = page(admin_client, "wake_agent_change", "ops")
    assert 'value="22:30"' in shown
    assert 'value="00:00"' in shown
    in_the_list = page(admin_client, "wake_agent_changelist")
    assert "qwen3:8b at http://127.0.0.1:11434/v1" in in_the_list
    assert "pass-word" not in in_the_list


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("url", {"runner": "openclaw"}),
        ("url", {"runner": "openclaw", "url": "ftp://other.example/"}),
        ("url", {"runner": "http", "url": "wss://other.example/"}),
        ("url", {"runner": "chat", "url": "ws://llm/v1", "model": "m"}),
        ("url", {"runner": "inbox", "url": "nonsense"}),
        ("model", {"runner": "chat", "url": "http://llm/v1"}),
        ("key_variable", {"key_variable": "SECRET_KEY"}),
        ("transcript_bytes", {"transcript_bytes": "-1"}),
        ("active_from", {"active_from": "25:00"}),
        ("active_until", {"active_from": "08:00"}),
        ("active_until", {"active_from": "08:00", "active_until": "08:00"}),
        ("time_zone", {"time_zone": "Mars/Olympus"}),
        ("time_zone", {"time_zone": ""}),
        ("idle_runs", {"idle_runs": "never"}),
        ("max_parallel_runs", {"max_parallel_runs": "0"}),
        ("max_runs_per_minute", {"max_runs_per_minute": "1001"}),
        ("max_self_wakes", {"max_self_wakes": "few"}),
        ("reply_url", {"reply_url": "wss://log.example/"}),
    ],
)
def test_nonsense_is_refused_on_its_own_field(
    field: str, changes: dict[str, str], admin_client: Client
) -> None:
    response = admin_client.post(reverse("admin:wake_agent_add"), agent_form(**changes))
    assert set(errors_of(response)) == {field}
    assert not Agent.objects.filter(pk="ops").exists()


@pytest.mark.parametrize(
    ("agent", "shown"),
    [
        ({"runner": "command", "command": [*find("codex").command, "-m", "x"]}, "codex -m x"),
        (
            {"runner": "openclaw", "url": "wss://u:pass-word@gw.example/?token=t"},
            "wss://gw.example/",
        ),
        ({"runner": "inbox", "url": "https://old.example/"}, None),
    ],
)
def test_the_list_shows_what_a_runner_reaches(
    agent: dict[str, Any], shown: str | None, admin_client: Client
) -> None:
    Agent.objects.create(id="ops", **agent)
    text = page(admin_client, "wake_agent_changelist")
    for hidden in ("pass-word", "token=t", "old.example"):
        assert hidden not in text
    assert shown is None or f'<span class="wake-code">{shown}</span>' in text


@pytest.mark.parametrize(
    ("written", "minutes"), [("1h30m", 90), ("0", 0), ("off", 0), ("2d", 2880)]
)
def test_the_schedule_is_written_as_on_the_command_line(
    written: str, minutes: int, admin_client: Client
) -> None:
    admin_client.post(reverse("admin:wake_agent_add"), agent_form(heartbeat_every=written))
    assert Agent.objects.get(pk="ops").heartbeat_every == timedelta(minutes=minutes)


@pytest.mark.parametrize("written", ["", "30", "soon", "-5m", "400d"])
def test_a_schedule_that_is_none_is_refused(written: str, admin_client: Client) -> None:
    url = reverse("admin:wake_agent_add")
    response = admin_client.post(url, agent_form(heartbeat_every=written))
    assert "heartbeat_every" in errors_of(response)
    assert not Agent.objects.filter(pk="ops").exists()


def test_pausing_is_in_force_at_once(admin_client: Client) -> None:
    give_main_a_runner()
    assert configuration.gateway().agents["main"].runs
    assert said(act(admin_client, "agent", "pause", "main")) == ["1 agent paused."]
    configuration.gateway.forget()
    assert not configuration.gateway().agents["main"].runs
    assert said(act(admin_client, "agent", "resume", "main")) == ["1 agent resumed."]
    assert not Agent.objects.get(pk="main").paused


def test_the_default_agent_is_not_disabled(admin_client: Client) -> None:
    form = agent_form(name="Main")
    del form["enabled"]
    response = admin_client.post(reverse("admin:wake_agent_change", args=["main"]), form)
    assert "default agent" in str(errors_of(response)["enabled"])
    assert Agent.objects.get(pk="main").enabled


def test_an_id_stays_what_it_is(admin_client: Client) -> None:
    Agent.objects.create(id="ops")
    url = reverse("admin:wake_agent_change", args=["ops"])
    assert admin_client.post(url, agent_form(id="renamed")).status_code == 302
    assert set(Agent.objects.values_list("pk", flat=True)) == {"main", "ops"}


def test_agents_that_are_needed_are_not_deleted(admin_client: Client) -> None:
    wake("x", "chat:1", agent=Agent.objects.create(id="ops").pk)
    for agent, reason in (("main", "is the default agent"), ("ops", "has 1 session")):
        response = admin_client.post(
            reverse("admin:wake_agent_delete", args=[agent]), {"post": "yes"}, follow=True
        )
        assert reason in said(response)[0]
    act(admin_client, "agent", "delete_selected", "ops", post="yes")
    assert "delete_selected" not in page(admin_client, "wake_agent_changelist")
    assert set(Agent.objects.values_list("pk", flat=True)) == {"main", "ops"}


def test_an_agent_that_nothing_needs_is_deleted(admin_client: Client) -> None:
    Agent.objects.create(id="ops")
    admin_client.post(reverse("admin:wake_agent_delete", args=["ops"]), {"post": "yes"})
    assert not Agent.objects.filter(pk="ops").exists()


# --- Gateway settings ---------------------------------------------------------------------------


def test_the_settings_are_one_form(admin_client: Client) -> None:
    change = reverse("admin:wake_gatewaysettings_change", args=["1"])
    changelist = reverse("admin:wake_gatewaysettings_changelist")
    assert admin_client.get(changelist).headers["Location"] == change
    assert admin_client.get(reverse("admin:wake_gatewaysettings_add")).status_code == 403
    form = {
        "default_agent": "main",
        "scope": "global",
        "main_key": "main",
        "max_parallel_heartbeats": "4",
        "max_queued_events": "100",
    }
    admin_client.post(change, form, follow=True)
    stored = GatewaySettings.objects.get()
    assert (stored.scope, stored.heartbeats_enabled) == ("global", False)
    Agent.objects.create(id="off", enabled=False)
    response = admin_client.post(change, {**form, "default_agent": "off"})
    assert "default_agent" in errors_of(response)


# --- Gateway tokens -----------------------------------------------------------------------------


def token_form(*scopes: str, **values: str) -> dict[str, Any]:
    return {"name": "laptop", "expires_at_0": "", "expires_at_1": "", "scopes": scopes, **values}


def add_token(client: Client, *scopes: str, **values: str) -> Response:
    return client.post(reverse("admin:wake_gatewaytoken_add"), token_form(*scopes, **values))


def test_a_gateway_token_is_shown_once_and_kept_as_a_hash(admin_client: Client) -> None:
    ends = {"expires_at_0": "2030-01-01", "expires_at_1": "00:00:00"}
    response = add_token(admin_client, *OperatorScope.values, **ends)
    found = re.search(r"ocg_[\w-]{40,}", response.content.decode())
    assert found
    token = found[0]
    assert token not in str(response.cookies)
    stored = GatewayToken.objects.get()
    assert stored.digest == tokens.digest(token)
    assert stored.expires_at == datetime(2030, 1, 1, tzinfo=UTC)
    assert_stored_nowhere(token)
    for text in (
        page(admin_client, "wake_gatewaytoken_changelist"),
        page(admin_client, "wake_gatewaytoken_change", stored.pk),
    ):
        assert token not in text
        assert stored.hint in text


def test_a_token_is_revoked_for_good_and_its_hash_cannot_be_forged(admin_client: Client) -> None:
    row, token = tokens.create(GatewayToken, "laptop", prefix="ocg_")
    change = reverse("admin:wake_gatewaytoken_change", args=[row.pk])
    forged = token_form("operator.read", name="renamed", digest=tokens.digest("ocg_mine"), hint="x")
    assert admin_client.post(change, forged).status_code == 302
    response = act(admin_client, "gatewaytoken", "revoke", row.pk)
    assert said(response)[-1] == "1 token revoked."
    admin_client.post(change, {**forged, "revoked_at": "", "revoked_at_0": ""})
    row.refresh_from_db()
    assert (row.name, row.digest) == ("renamed", tokens.digest(token))
    assert not tokens.is_usable(row, timezone.now())
    assert "revoked" in page(admin_client, "wake_gatewaytoken_changelist")


def boxes(text: str) -> dict[str, bool]:
    """Return the boxes of a page's scopes, and whether each is ticked."""
    tags = re.findall(r'<input[^>]*name="scopes"[^>]*>', text)
    values = [re.search(r'value="([^"]*)"', tag) for tag in tags]
    return {
        value[1]: bool(re.search(r"\schecked[\s>]", tag))
        for value, tag in zip(values, tags, strict=True)
        if value
    }


def test_a_gateway_token_holds_the_scopes_that_are_ticked(admin_client: Client) -> None:
    assert boxes(page(admin_client, "wake_gatewaytoken_add")) == dict.fromkeys(
        OperatorScope.values, True
    )
    response = add_token(admin_client, "operator.read", "operator.write")
    assert "ws://testserver/ws" in response.context["example"]
    row = GatewayToken.objects.get()
    assert row.scopes == ["operator.read", "operator.write"]
    assert "read, write" in page(admin_client, "wake_gatewaytoken_changelist")
    change = reverse("admin:wake_gatewaytoken_change", args=[row.pk])
    ticked = {"operator.read": True, "operator.write": True, "operator.admin": False}
    assert boxes(admin_client.get(change).content.decode()) == ticked
    admin_client.post(change, token_form("operator.admin"))
    row.refresh_from_db()
    assert row.scopes == ["operator.admin"]


def test_a_token_that_may_only_read_comes_without_a_line_that_writes(admin_client: Client) -> None:
    response = add_token(admin_client, "operator.read")
    assert response.context["secret"].startswith("ocg_")
    assert "system_event" not in response.content.decode()


@pytest.mark.parametrize("scopes", [[], ["operator.everything"], ["operator.read", "admin"]])
def test_a_gateway_token_without_a_scope_or_with_an_unknown_one_is_refused(
    scopes: list[str], admin_client: Client
) -> None:
    assert "scopes" in errors_of(add_token(admin_client, *scopes))
    assert not GatewayToken.objects.exists()


def test_who_may_only_look_sees_what_a_gateway_token_holds(viewer: Client) -> None:
    row, _ = tokens.create_for_gateway("laptop", scopes=["operator.read", "operator.write"])
    text = page(viewer, "wake_gatewaytoken_change", row.pk)
    assert "read, write" in text
    assert boxes(text) == {}


def test_a_rotated_gateway_token_is_shown_once_and_holds_the_same(admin_client: Client) -> None:
    row, _ = tokens.create_for_gateway("laptop", scopes=["operator.write"])
    rotate = reverse("admin:wake_gatewaytoken_rotate", args=[row.pk])
    asked = act(admin_client, "gatewaytoken", "rotate", row.pk, stay="1")
    assert f'action="{rotate}"' in asked.content.decode()
    response = admin_client.post(rotate, {"name": "laptop", "keep_old": "7d"})
    token = response.context["secret"]
    assert_stored_nowhere(token)
    assert f"OPENCLAW_GATEWAY_TOKEN={token} " in response.context["example"]
    made = GatewayToken.objects.get(name="laptop")
    assert (made.digest, made.scopes) == (tokens.digest(token), ["operator.write"])
    row.refresh_from_db()
    assert row.name.startswith("laptop (until ")
    assert tokens.is_usable(row, timezone.now() + timedelta(days=6))
    assert said(act(admin_client, "gatewaytoken", "revoke", made.pk))[-1] == "2 tokens revoked."


def test_a_gateway_token_with_scopes_that_are_unknown_here_is_not_rotated(
    admin_client: Client,
) -> None:
    row, _ = tokens.create_for_gateway("laptop")
    GatewayToken.objects.update(scopes=["operator.newer"])
    rotate = reverse("admin:wake_gatewaytoken_rotate", args=[row.pk])
    response = admin_client.post(rotate, {"name": "laptop", "keep_old": "24h"}, follow=True)
    assert said(response) == ["operator.newer is no scope."]
    assert GatewayToken.objects.get().name == "laptop"


# --- Cost ---------------------------------------------------------------------------------------


def test_lists_ask_for_as_much_with_many_rows_as_with_few(
    admin_client: Client, django_assert_max_num_queries: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for snapshot in (configuration.gateway, hooks):
        monkeypatch.setattr(snapshot, "_max_age", 60.0)  # however slow the machine
    give_main_a_runner()
    for number in range(14):
        agent = Agent.objects.create(id=f"agent-{number}")
        wake(f"text {number}", f"chat:{number}")
        deliver()
        wake(f"text {number}", f"chat:{number}", agent=agent.pk)

    def fresh() -> None:
        """Read the hooks' part of it before what is counted: in a server a thread does."""
        configuration.gateway.forget()
        hooks()

    for name in ("session", "systemevent", "heartbeat", "agent"):
        fresh()
        with django_assert_max_num_queries(9):
            page(admin_client, f"wake_{name}_changelist")
    fresh()
    with django_assert_max_num_queries(11):
        page(admin_client, "index")
    session = Session.objects.filter(agent_id="main").latest("pk")
    for name, key in (("session", session.pk), ("heartbeat", Heartbeat.objects.latest("pk").pk)):
        fresh()
        with django_assert_max_num_queries(12):
            page(admin_client, f"wake_{name}_change", key)
