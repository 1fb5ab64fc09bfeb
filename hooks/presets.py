"""Presets: mappings for well-known senders, ready but for a secret.

All but one have a fixed session key, so that they work under the policy as it is out of the box;
what is needed for one session for each repository, customer or channel is said beside them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, Final

from hooks.models import HookMapping, SignatureScheme


@dataclass(frozen=True, slots=True)
class Preset:
    """A mapping to start from.

    `values` are fields of a `HookMapping`; `sample` is the key of one of `hooks.samples`. `needs`
    is what the operator still has to do, and `how_to_send` where the service takes the mapping's
    URL: whole sentences, to be shown as they are.
    """

    key: str
    title: str
    summary: str
    values: Mapping[str, Any]
    sample: str
    needs: tuple[str, ...]
    how_to_send: str


def find(key: str) -> Preset:
    """Return the preset called `key`. Raises KeyError."""
    return _by_key[key]


def new_mapping(preset: Preset, *, taken_names: Collection[str]) -> HookMapping:
    """Return an unsaved mapping with a preset's values, under a name that is not taken.

    The second one of a preset is called "GitHub 2" and answers at another path (`github-2`): at
    the first one's path it would never be asked.
    """
    mapping = HookMapping(name=preset.title, **preset.values)
    if preset.title in taken_names:
        number = next(
            number for number in count(2) if f"{preset.title} {number}" not in taken_names
        )
        mapping.name = f"{preset.title} {number}"
        mapping.match_path = f"{mapping.match_path}-{number}"
    return mapping


def _own_sessions(what: str, key: str) -> str:
    prefix, _, _ = key.partition("{{")
    return (
        f"All events go to one session. For a session for each {what} write the session key {key}; "
        'then "Requests may choose the session" must be on in the policy, with a prefix such as '
        f"{prefix}."
    )


def _lines(*lines: str) -> str:
    return "\n".join(lines)


PRESETS: Final[tuple[Preset, ...]] = (
    Preset(
        key="github",
        title="GitHub",
        summary="Pushes, pull requests, issues, releases and workflow runs as one line each.",
        values={
            "match_path": "github",
            "signature_scheme": SignatureScheme.GITHUB,
            "session_key": "hook:github",
            "transform": "github",
        },
        sample="github-push",
        needs=(
            "Leave the signing secret empty: one is made when you save. Give GitHub the same one.",
            _own_sessions("repository", "hook:github:{{repository.full_name}}"),
        ),
        how_to_send=(
            "In the repository or organization open Settings, Webhooks, Add webhook. Paste the URL "
            "as Payload URL, choose the content type application/json, paste the secret, and "
            "choose the events. GitHub's first request, a ping, is answered and does nothing."
        ),
    ),
    Preset(
        key="stripe",
        title="Stripe",
        summary="Payments, invoices, subscriptions and all other events of a Stripe account.",
        values={
            "match_path": "stripe",
            "signature_scheme": SignatureScheme.STRIPE,
            "session_key": "hook:stripe",
            "text_template": _lines(
                "Stripe {{type}}",
                "{{data.object.object}}: {{data.object.id}}",
                "status: {{data.object.status}}",
                "customer: {{data.object.customer}}",
                "amount: {{data.object.amount}}",
                "amount due: {{data.object.amount_due}}",
                "currency: {{data.object.currency}} (amounts are in its smallest unit)",
                "live: {{livemode}}",
            ),
        },
        sample="stripe-payment-succeeded",
        needs=(
            "Paste the endpoint's signing secret (whsec_…), which Stripe shows when the endpoint "
            "has been added.",
            _own_sessions("customer", "hook:stripe:{{data.object.customer}}")
            + " Events of objects without a customer are then refused.",
        ),
        how_to_send=(
            "In Stripe's Workbench open Webhooks and add a destination of the type webhook "
            "endpoint. Choose the events, paste the URL, and copy the signing secret."
        ),
    ),
    Preset(
        key="slack",
        title="Slack",
        summary="Mentions of a Slack app, and other events that it subscribes to.",
        values={
            "match_path": "slack",
            "signature_scheme": SignatureScheme.SLACK,
            "session_key": "hook:slack",
            "text_template": _lines(
                "Slack {{event.type}} in channel {{event.channel}} by user {{event.user}} "
                "(ts {{event.ts}}):",
                "{{event.text}}",
            ),
        },
        sample="slack-mention",
        needs=(
            "Paste the app's Signing Secret (in Slack: Basic Information, App Credentials), and "
            "save before you give Slack the URL: Slack checks it at once.",
            _own_sessions("channel", "hook:slack:{{event.channel}}"),
        ),
        how_to_send=(
            "In the Slack app open Event Subscriptions, turn events on, and paste the URL as "
            "Request URL. Subscribe to the bot event app_mention. An agent that writes to a "
            "channel whose messages it also receives would answer itself for ever."
        ),
    ),
    Preset(
        key="gmail",
        title="Gmail",
        summary="A turn of its own for each new mail, as OpenClaw's Gmail watcher posts them.",
        values={
            "match_path": "gmail",
            "action": HookMapping.Action.AGENT,
            "session_key": "hook:gmail:{{messages[0].id}}",
            "for_each": "messages",
            "text_template": _lines(
                "New email from {{messages[0].from}}",
                "Subject: {{messages[0].subject}}",
                "{{messages[0].snippet}}",
                "{{messages[0].body}}",
            ),
        },
        sample="gmail",
        needs=(
            '"Requests may choose the session" must be on in the policy, with a prefix such as '
            "hook:gmail:.",
            "Give the watcher a hook token, best one for this mapping only.",
        ),
        how_to_send=(
            "Start the watcher with this URL and the hook token: openclaw webhooks gmail setup "
            "--account YOU@gmail.com --hook-url URL --hook-token TOKEN --include-body. "
            "gog gmail watch serve takes the same three options of the hook."
        ),
    ),
    Preset(
        key="alertmanager",
        title="Alertmanager",
        summary="One event for each alert of Prometheus that fires or is resolved.",
        values={
            "match_path": "alertmanager",
            "session_key": "hook:alertmanager",
            "for_each": "alerts",
            "text_template": _lines(
                "Alert {{alerts[0].status}}: {{alerts[0].labels.alertname}}",
                "labels: {{alerts[0].labels}}",
                "annotations: {{alerts[0].annotations}}",
                "since: {{alerts[0].startsAt}}",
                "source: {{alerts[0].generatorURL}}",
            ),
        },
        sample="alertmanager",
        needs=(
            "Give Alertmanager a hook token, best one for this mapping only.",
            _own_sessions("alert", "hook:alertmanager:{{alerts[0].fingerprint}}"),
        ),
        how_to_send=(
            "In alertmanager.yml add to a receiver: webhook_configs with the url, max_alerts: 200 "
            "(more in one request are refused) and http_config: {authorization: {credentials: "
            "TOKEN}}."
        ),
    ),
    Preset(
        key="sentry",
        title="Sentry",
        summary="Issue alerts, metric alerts and changes of issues.",
        values={
            "match_path": "sentry",
            "signature_scheme": SignatureScheme.HMAC,
            "signature_header": "Sentry-Hook-Signature",
            "session_key": "hook:sentry",
            # Each kind of request has its values elsewhere, and what is missing is empty.
            "text_template": _lines(
                "Sentry {{headers.sentry-hook-resource}} {{action}}: {{data.event.title}}"
                "{{data.issue.title}}{{data.error.title}}{{data.description_title}}",
                "in: {{data.event.culprit}}{{data.issue.culprit}}{{data.error.culprit}}",
                "level: {{data.event.level}}{{data.issue.level}}{{data.error.level}}",
                "rule: {{data.triggered_rule}}{{data.metric_alert.alert_rule.name}}",
                "{{data.event.web_url}}{{data.issue.web_url}}{{data.error.web_url}}{{data.web_url}}",
            ),
        },
        sample="sentry",
        needs=(
            "Paste the Client Secret of the integration, which Sentry shows when it has been "
            "saved.",
            _own_sessions("issue", "hook:sentry:{{data.event.issue_id}}")
            + " Only issue alerts have that value; the other requests are then refused.",
        ),
        how_to_send=(
            "In Sentry open Settings, Developer Settings (Custom Integrations), and create an "
            "internal integration. Paste the URL as Webhook URL, turn Alert Rule Action on, and "
            "choose the resources. Then choose the integration as the action of an alert rule."
        ),
    ),
)

_by_key: Final = {preset.key: preset for preset in PRESETS}
