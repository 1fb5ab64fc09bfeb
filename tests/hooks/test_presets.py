"""Presets: each makes a mapping that works at once, tried with its service's own request."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.http import HttpResponse
from django.test import Client
from django.utils import timezone

from hooks import presets, samples
from hooks.models import HookMapping
from hooks.presets import PRESETS, Preset, new_mapping
from hooks.samples import SAMPLES, Sample
from hooks.signatures import SignatureConfiguration, sign
from hooks.template import visible_headers
from tests.hooks.conftest import Send, allow_keys, error_of, rows
from wake.models import SystemEvent

SECRET = "whsec_bm90LWEtcmVhbC1zZWNyZXQtMTIzNDU2"
# How each service signs, whatever its preset says.
SENDERS = {
    "github": SignatureConfiguration("github", (SECRET,)),
    "stripe": SignatureConfiguration("stripe", (SECRET,)),
    "slack": SignatureConfiguration("slack", (SECRET,)),
    "sentry": SignatureConfiguration("hmac", (SECRET,), header="Sentry-Hook-Signature"),
}
SIGNED = [preset for preset in PRESETS if "signature_scheme" in preset.values]
UNSIGNED = [preset for preset in PRESETS if preset not in SIGNED]

# What the agent reads of each sample: the session, and the text.
READ: dict[str, list[tuple[str, str]]] = {
    "github-push": [
        ("github", 'push to main in octo/app by alice: 2 commits, "Fix the build"'),
    ],
    "github-pull-request": [
        ("github", 'pull_request opened in octo/app by alice: #12 "Add a cache"'),
    ],
    "github-issue": [
        ("github", 'issues opened in octo/app by alice: #7 "The build fails on Windows"'),
    ],
    "stripe-payment-succeeded": [
        (
            "stripe",
            "Stripe payment_intent.succeeded\n"
            "payment_intent: pi_3Madeup000000000001\n"
            "status: succeeded\n"
            "customer: cus_Madeup00000001\n"
            "amount: 4900\n"
            "amount due: \n"
            "currency: eur (amounts are in its smallest unit)\n"
            "live: false",
        ),
    ],
    "stripe-invoice-failed": [
        (
            "stripe",
            "Stripe invoice.payment_failed\n"
            "invoice: in_1Madeup000000000002\n"
            "status: open\n"
            "customer: cus_Madeup00000002\n"
            "amount: \n"
            "amount due: 2900\n"
            "currency: eur (amounts are in its smallest unit)\n"
            "live: false",
        ),
    ],
    "slack-mention": [
        (
            "slack",
            "Slack app_mention in channel C0MADEUP01 by user U0MADEUP01 (ts 1795362221.000100):\n"
            "<@U0MADEUP99> is the deploy done?",
        ),
    ],
    "gmail": [
        (
            "gmail:19madeup00000001",
            "New email from Alice <alice@example.com>\n"
            "Subject: Lunch on Friday?\n"
            "Are you free on Friday at noon?\n"
            "Are you free on Friday at noon? The place at the corner is open.",
        ),
        (
            "gmail:19madeup00000002",
            "New email from Billing <billing@example.net>\n"
            "Subject: Your invoice\n"
            "Invoice 88 is attached.\n"
            "Invoice 88 is attached. It is due on 6 December.",
        ),
    ],
    "alertmanager": [
        (
            "alertmanager",
            "Alert firing: DiskAlmostFull\n"
            'labels: {"alertname":"DiskAlmostFull","instance":"db1:9100","job":"node",'
            '"severity":"critical"}\n'
            'annotations: {"summary":"The disk of db1 is 95 % full"}\n'
            "since: 2026-11-22T15:43:41.213Z\n"
            "source: http://prometheus.example.com:9090/graph?g0.expr=disk",
        ),
        (
            "alertmanager",
            "Alert resolved: NodeDown\n"
            'labels: {"alertname":"NodeDown","instance":"web2:9100","job":"node",'
            '"severity":"critical"}\n'
            'annotations: {"summary":"web2 does not answer"}\n'
            "since: 2026-11-22T15:20:11.213Z\n"
            "source: http://prometheus.example.com:9090/graph?g0.expr=up",
        ),
    ],
    "sentry": [
        (
            "sentry",
            "Sentry event_alert triggered: KeyError: 'total'\n"
            "in: shop.views in checkout\n"
            "level: error\n"
            "rule: Many errors at the checkout\n"
            "https://sentry.io/organizations/octo/issues/5001/events/4c1e6f1d2a10/",
        ),
    ],
}
SIGNED_KEYS = [key for key in READ if key.partition("-")[0] in {preset.key for preset in SIGNED}]
UNSIGNED_KEYS = [key for key in READ if key not in SIGNED_KEYS]

by_key = pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.key)


def save(preset: Preset, **changes: Any) -> HookMapping:
    """Save a preset's mapping as the admin's form does, with a secret where it needs one."""
    mapping = new_mapping(preset, taken_names=list_names())
    if mapping.signature_scheme:
        mapping.signing_secret = SECRET
    for name, value in changes.items():
        setattr(mapping, name, value)
    mapping.full_clean()
    mapping.save()
    return mapping


def list_names() -> list[str]:
    return list(HookMapping.objects.values_list("name", flat=True))


def preset_of(sample_key: str) -> Preset:
    return presets.find(sample_key.partition("-")[0])


def signed(client: Client, mapping: HookMapping, sample: Sample) -> HttpResponse:
    """Send a sample with its sender's signature and no token."""
    body = json.dumps(sample.payload).encode()
    headers = {**sample.headers, **sign(SENDERS[mapping.match_path], body, timezone.now())}
    response = client.generic(
        "POST", f"/hooks/{mapping.match_path}", body, "application/json", headers=headers
    )
    assert isinstance(response, HttpResponse)
    return response


def stored() -> list[tuple[str, str]]:
    """Return the session, without what all share, and the text of each event, in order."""
    return [
        (event.session.key.removeprefix("agent:main:hook:"), event.text)
        for event in SystemEvent.objects.select_related("session").order_by("pk")
    ]


@pytest.mark.parametrize("key", SIGNED_KEYS)
def test_a_signed_request_of_the_service_is_read_under_the_default_policy(
    client: Client, db: None, key: str
) -> None:
    mapping = save(preset_of(key))
    response = signed(client, mapping, samples.find(key))
    assert (response.status_code, stored()) == (200, READ[key]), response.content


@pytest.mark.parametrize("key", UNSIGNED_KEYS)
def test_a_request_with_a_token_is_read(send: Send, key: str) -> None:
    if key == "gmail":
        allow_keys("hook:gmail:")
    mapping, sample = save(preset_of(key)), samples.find(key)
    response = send(f"/hooks/{mapping.match_path}", sample.payload, headers=dict(sample.headers))
    assert (response.status_code, stored()) == (200, READ[key]), response.content


def test_gmail_needs_the_policy_and_says_which_setting(send: Send) -> None:
    save(presets.find("gmail"))
    response = send("/hooks/gmail", samples.find("gmail").payload)
    assert response.status_code == 400
    assert "requests may choose the session" in error_of(response)
    assert stored() == []


def test_each_mail_is_a_turn_of_its_own(send: Send) -> None:
    allow_keys("hook:")
    save(presets.find("gmail"))
    send("/hooks/gmail", samples.find("gmail").payload)
    assert list(SystemEvent.objects.values_list("alone", flat=True)) == [True, True]


def test_the_ping_of_github_does_nothing(client: Client, db: None) -> None:
    response = signed(client, save(presets.find("github")), samples.find("github-ping"))
    assert (response.status_code, response.content, rows()) == (204, b"", (0, 0, 0))


def test_slack_s_check_of_the_address_is_answered(client: Client, db: None) -> None:
    response = signed(client, save(presets.find("slack")), samples.find("slack-challenge"))
    assert (response.status_code, response.content) == (200, b"made-up-challenge-0001")
    assert stored() == []


@pytest.mark.parametrize(
    ("resource", "payload", "text"),
    [
        (
            "issue",
            {
                "action": "resolved",
                "data": {
                    "issue": {
                        "id": "5001",
                        "title": "KeyError: 'total'",
                        "culprit": "shop.views in checkout",
                        "level": "error",
                        "web_url": "https://sentry.io/organizations/octo/issues/5001/",
                    }
                },
            },
            "Sentry issue resolved: KeyError: 'total'\n"
            "in: shop.views in checkout\n"
            "level: error\n"
            "rule: \n"
            "https://sentry.io/organizations/octo/issues/5001/",
        ),
        (
            "metric_alert",
            {
                "action": "critical",
                "data": {
                    "metric_alert": {"alert_rule": {"name": "Slow checkout"}},
                    "description_title": "Critical: Slow checkout",
                    "web_url": "https://sentry.io/organizations/octo/alerts/rules/9/",
                },
            },
            "Sentry metric_alert critical: Critical: Slow checkout\n"
            "in: \n"
            "level: \n"
            "rule: Slow checkout\n"
            "https://sentry.io/organizations/octo/alerts/rules/9/",
        ),
    ],
)
def test_one_text_serves_all_kinds_of_sentry_s_requests(
    client: Client, db: None, resource: str, payload: Any, text: str
) -> None:
    sample = Sample("", "", payload, {"Sentry-Hook-Resource": resource})
    signed(client, save(presets.find("sentry")), sample)
    assert stored() == [("sentry", text)]


@pytest.mark.parametrize("preset", SIGNED, ids=lambda preset: preset.key)
def test_a_signed_mapping_is_not_saved_without_its_secret(db: None, preset: Preset) -> None:
    with pytest.raises(ValidationError) as raised:
        save(preset, signing_secret="")
    assert list(raised.value.message_dict) == ["signing_secret"]


@by_key
def test_the_session_key_that_is_advised_works_with_the_sample(send: Send, preset: Preset) -> None:
    keys = re.findall(r"hook:\S+}}", " ".join(preset.needs)) or [preset.values["session_key"]]
    assert len(keys) == 1
    prefix = keys[0].partition("{{")[0]
    assert f"{prefix}." in " ".join(preset.needs)
    allow_keys(prefix)
    mapping, sample = save(preset, session_key=keys[0]), samples.find(preset.sample)
    response = send(f"/hooks/{mapping.match_path}", sample.payload, headers=dict(sample.headers))
    assert response.status_code == 200, response.content
    assert all(f"hook:{session}".startswith(prefix) for session, _ in stored())
    assert len({session for session, _ in stored()}) == len(READ[preset.sample])


def test_a_second_mapping_of_a_preset_has_a_name_and_a_path_of_its_own(send: Send) -> None:
    first, second, third = (save(presets.find("github")) for _ in range(3))
    assert [first.name, second.name, third.name] == ["GitHub", "GitHub 2", "GitHub 3"]
    assert [first.match_path, second.match_path, third.match_path] == [
        "github",
        "github-2",
        "github-3",
    ]
    sample = samples.find("github-push")
    send("/hooks/github-2", sample.payload, headers=dict(sample.headers))
    assert SystemEvent.objects.get().source == "hook:GitHub 2"


def test_a_name_that_was_freed_is_taken_again(db: None) -> None:
    mapping = new_mapping(presets.find("stripe"), taken_names=["Stripe", "Stripe 3"])
    assert mapping.name == "Stripe 2"
    assert mapping.pk is None


@by_key
def test_a_preset_says_what_it_is_in_whole_sentences(preset: Preset) -> None:
    assert all(text.endswith(".") for text in (preset.summary, preset.how_to_send, *preset.needs))
    assert samples.find(preset.sample).key.partition("-")[0] == preset.key


def test_no_two_presets_or_samples_share_a_key_or_a_title() -> None:
    for things in (PRESETS, SAMPLES):
        names = Counter([thing.key for thing in things] + [thing.title for thing in things])
        assert max(names.values()) == 1


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.key)
def test_a_sample_is_json_and_carries_no_credential(sample: Sample) -> None:
    assert json.loads(json.dumps(sample.payload)) == sample.payload
    assert len(visible_headers(sample.headers)) == len(sample.headers)


def test_the_generic_sample_works_at_the_endpoint_for_wakes(send: Send) -> None:
    response = send("/hooks/wake", samples.find("generic").payload)
    assert response.status_code == 200, response.content
    assert SystemEvent.objects.get().text == "The backup is done"
