"""Requests as services send them: to try a mapping out before the service sends a real one.

The names of the fields are those that the services document; every value is made up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

_GITHUB_SENDER: Final = {"login": "alice", "id": 1001, "type": "User", "site_admin": False}
_GITHUB_REPOSITORY: Final = {
    "id": 2001,
    "name": "app",
    "full_name": "octo/app",
    "private": False,
    "owner": {"login": "octo", "id": 1000, "type": "Organization"},
    "html_url": "https://github.com/octo/app",
    "default_branch": "main",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One request. `payload` is a JSON value; `headers` are written as the service writes them.

    The headers say what the request is about. A credential is none of them: whoever sends a sample
    adds a token or a signature.
    """

    key: str
    title: str
    payload: Any
    headers: Mapping[str, str] = field(default_factory=dict)


def find(key: str) -> Sample:
    """Return the sample called `key`. Raises KeyError."""
    return _by_key[key]


def _github(event: str, delivery: str) -> dict[str, str]:
    return {
        "User-Agent": "GitHub-Hookshot/5a1c0de",
        "X-GitHub-Event": event,
        "X-GitHub-Delivery": delivery,
        "X-GitHub-Hook-ID": "3001",
        "X-GitHub-Hook-Installation-Target-ID": "2001",
        "X-GitHub-Hook-Installation-Target-Type": "repository",
    }


SAMPLES: Final[tuple[Sample, ...]] = (
    Sample(
        key="github-push",
        title="GitHub: a push",
        headers=_github("push", "6f1d2a10-4c1e-11f1-9a53-0242ac120001"),
        payload={
            "ref": "refs/heads/main",
            "before": "8d1f0e4c9a7b6d5e4f3a2b1c0d9e8f7a6b5c4d3e",
            "after": "2b7e151628aed2a6abf7158809cf4f3c762e7160",
            "created": False,
            "deleted": False,
            "forced": False,
            "base_ref": None,
            "compare": "https://github.com/octo/app/compare/8d1f0e4c9a7b...2b7e151628ae",
            "commits": [
                {
                    "id": "f1d2d2f924e986ac86fdf7b36c94bcdf32beec15",
                    "message": "Add a test for the cache",
                    "timestamp": "2026-11-22T16:40:03+01:00",
                    "url": "https://github.com/octo/app/commit/f1d2d2f924e9",
                    "author": {"name": "Alice", "email": "alice@example.com", "username": "alice"},
                    "added": ["tests/test_cache.py"],
                    "removed": [],
                    "modified": [],
                },
                {
                    "id": "2b7e151628aed2a6abf7158809cf4f3c762e7160",
                    "message": "Fix the build\n\nThe cache was not cleared.",
                    "timestamp": "2026-11-22T16:43:41+01:00",
                    "url": "https://github.com/octo/app/commit/2b7e151628ae",
                    "author": {"name": "Alice", "email": "alice@example.com", "username": "alice"},
                    "added": [],
                    "removed": [],
                    "modified": ["app/cache.py"],
                },
            ],
            "head_commit": {
                "id": "2b7e151628aed2a6abf7158809cf4f3c762e7160",
                "message": "Fix the build\n\nThe cache was not cleared.",
                "timestamp": "2026-11-22T16:43:41+01:00",
                "url": "https://github.com/octo/app/commit/2b7e151628ae",
                "author": {"name": "Alice", "email": "alice@example.com", "username": "alice"},
                "added": [],
                "removed": [],
                "modified": ["app/cache.py"],
            },
            "repository": _GITHUB_REPOSITORY,
            "pusher": {"name": "alice", "email": "alice@example.com"},
            "sender": _GITHUB_SENDER,
        },
    ),
    Sample(
        key="github-pull-request",
        title="GitHub: a pull request is opened",
        headers=_github("pull_request", "6f1d2a10-4c1e-11f1-9a53-0242ac120002"),
        payload={
            "action": "opened",
            "number": 12,
            "pull_request": {
                "number": 12,
                "title": "Add a cache",
                "body": "Pages are read from memory for a minute.",
                "state": "open",
                "draft": False,
                "merged": False,
                "html_url": "https://github.com/octo/app/pull/12",
                "user": _GITHUB_SENDER,
                "head": {"ref": "cache", "sha": "2b7e151628aed2a6abf7158809cf4f3c762e7160"},
                "base": {"ref": "main", "sha": "8d1f0e4c9a7b6d5e4f3a2b1c0d9e8f7a6b5c4d3e"},
                "commits": 2,
                "additions": 40,
                "deletions": 3,
                "changed_files": 2,
            },
            "repository": _GITHUB_REPOSITORY,
            "sender": _GITHUB_SENDER,
        },
    ),
    Sample(
        key="github-issue",
        title="GitHub: an issue is opened",
        headers=_github("issues", "6f1d2a10-4c1e-11f1-9a53-0242ac120003"),
        payload={
            "action": "opened",
            "issue": {
                "number": 7,
                "title": "The build fails on Windows",
                "body": "Since yesterday, with a path that is too long.",
                "state": "open",
                "html_url": "https://github.com/octo/app/issues/7",
                "user": _GITHUB_SENDER,
                "labels": [{"name": "bug", "color": "d73a4a"}],
                "assignees": [],
                "comments": 0,
                "created_at": "2026-11-22T15:43:41Z",
            },
            "repository": _GITHUB_REPOSITORY,
            "sender": _GITHUB_SENDER,
        },
    ),
    Sample(
        key="github-ping",
        title="GitHub: the ping of a new webhook",
        headers=_github("ping", "6f1d2a10-4c1e-11f1-9a53-0242ac120004"),
        payload={
            "zen": "Keep it short.",
            "hook_id": 3001,
            "hook": {
                "type": "Repository",
                "id": 3001,
                "name": "web",
                "active": True,
                "events": ["push", "pull_request", "issues"],
                "config": {"content_type": "json", "insecure_ssl": "0"},
            },
            "repository": _GITHUB_REPOSITORY,
            "sender": _GITHUB_SENDER,
        },
    ),
    Sample(
        key="stripe-payment-succeeded",
        title="Stripe: a payment succeeded",
        headers={"User-Agent": "Stripe/1.0 (+https://stripe.com/docs/webhooks)"},
        payload={
            "id": "evt_3Madeup000000000001",
            "object": "event",
            "api_version": "2026-01-28",
            "created": 1795362221,
            "data": {
                "object": {
                    "id": "pi_3Madeup000000000001",
                    "object": "payment_intent",
                    "amount": 4900,
                    "amount_received": 4900,
                    "currency": "eur",
                    "customer": "cus_Madeup00000001",
                    "description": "Order 1042",
                    "metadata": {"order": "1042"},
                    "status": "succeeded",
                }
            },
            "livemode": False,
            "pending_webhooks": 1,
            "request": {"id": "req_Madeup00000001", "idempotency_key": None},
            "type": "payment_intent.succeeded",
        },
    ),
    Sample(
        key="stripe-invoice-failed",
        title="Stripe: the payment of an invoice failed",
        headers={"User-Agent": "Stripe/1.0 (+https://stripe.com/docs/webhooks)"},
        payload={
            "id": "evt_1Madeup000000000002",
            "object": "event",
            "api_version": "2026-01-28",
            "created": 1795362300,
            "data": {
                "object": {
                    "id": "in_1Madeup000000000002",
                    "object": "invoice",
                    "amount_due": 2900,
                    "amount_paid": 0,
                    "amount_remaining": 2900,
                    "attempt_count": 1,
                    "attempted": True,
                    "billing_reason": "subscription_cycle",
                    "currency": "eur",
                    "customer": "cus_Madeup00000002",
                    "customer_email": "bob@example.com",
                    "hosted_invoice_url": "https://invoice.stripe.com/i/madeup",
                    "next_payment_attempt": 1795621500,
                    "number": "MADEUP-0002",
                    "status": "open",
                }
            },
            "livemode": False,
            "pending_webhooks": 1,
            "request": {"id": None, "idempotency_key": None},
            "type": "invoice.payment_failed",
        },
    ),
    Sample(
        key="slack-mention",
        title="Slack: the app is mentioned",
        headers={"User-Agent": "Slackbot 1.0 (+https://api.slack.com/robots)"},
        payload={
            "team_id": "T0MADEUP01",
            "api_app_id": "A0MADEUP01",
            "event": {
                "type": "app_mention",
                "user": "U0MADEUP01",
                "text": "<@U0MADEUP99> is the deploy done?",
                "ts": "1795362221.000100",
                "channel": "C0MADEUP01",
                "event_ts": "1795362221.000100",
                "team": "T0MADEUP01",
            },
            "type": "event_callback",
            "event_id": "Ev0MADEUP01",
            "event_time": 1795362221,
            "authorizations": [
                {
                    "enterprise_id": None,
                    "team_id": "T0MADEUP01",
                    "user_id": "U0MADEUP99",
                    "is_bot": True,
                    "is_enterprise_install": False,
                }
            ],
            "is_ext_shared_channel": False,
            "event_context": "4-madeup",
        },
    ),
    Sample(
        key="slack-challenge",
        title="Slack: the check of a new address",
        headers={"User-Agent": "Slackbot 1.0 (+https://api.slack.com/robots)"},
        payload={"challenge": "made-up-challenge-0001", "type": "url_verification"},
    ),
    Sample(
        key="gmail",
        title="Gmail: two new messages, from OpenClaw's watcher",
        payload={
            "source": "gmail",
            "account": "you@example.com",
            "historyId": "4001",
            "messages": [
                {
                    "id": "19madeup00000001",
                    "threadId": "19madeup00000001",
                    "from": "Alice <alice@example.com>",
                    "to": "you@example.com",
                    "subject": "Lunch on Friday?",
                    "date": "Sun, 22 Nov 2026 16:43:41 +0100",
                    "snippet": "Are you free on Friday at noon?",
                    "body": "Are you free on Friday at noon? The place at the corner is open.",
                    "labels": ["INBOX", "UNREAD"],
                },
                {
                    "id": "19madeup00000002",
                    "threadId": "19madeup00000002",
                    "from": "Billing <billing@example.net>",
                    "to": "you@example.com",
                    "subject": "Your invoice",
                    "date": "Sun, 22 Nov 2026 16:44:10 +0100",
                    "snippet": "Invoice 88 is attached.",
                    "body": "Invoice 88 is attached. It is due on 6 December.",
                    "labels": ["INBOX", "UNREAD"],
                },
            ],
        },
    ),
    Sample(
        key="alertmanager",
        title="Alertmanager: one alert fires, one is resolved",
        headers={"User-Agent": "Alertmanager/0.28.1"},
        payload={
            "version": "4",
            "groupKey": '{}:{job="node"}',
            "truncatedAlerts": 0,
            "status": "firing",
            "receiver": "agents",
            "groupLabels": {"job": "node"},
            "commonLabels": {"job": "node", "severity": "critical"},
            "commonAnnotations": {},
            "externalURL": "http://alertmanager.example.com:9093",
            "alerts": [
                {
                    "status": "firing",
                    "labels": {
                        "alertname": "DiskAlmostFull",
                        "instance": "db1:9100",
                        "job": "node",
                        "severity": "critical",
                    },
                    "annotations": {"summary": "The disk of db1 is 95 % full"},
                    "startsAt": "2026-11-22T15:43:41.213Z",
                    "endsAt": "0001-01-01T00:00:00Z",
                    "generatorURL": "http://prometheus.example.com:9090/graph?g0.expr=disk",
                    "fingerprint": "00000000madeup01",
                },
                {
                    "status": "resolved",
                    "labels": {
                        "alertname": "NodeDown",
                        "instance": "web2:9100",
                        "job": "node",
                        "severity": "critical",
                    },
                    "annotations": {"summary": "web2 does not answer"},
                    "startsAt": "2026-11-22T15:20:11.213Z",
                    "endsAt": "2026-11-22T15:43:11.213Z",
                    "generatorURL": "http://prometheus.example.com:9090/graph?g0.expr=up",
                    "fingerprint": "00000000madeup02",
                },
            ],
        },
    ),
    Sample(
        key="sentry",
        title="Sentry: an issue alert",
        headers={
            "Request-ID": "0a1b2c3d4e5f40718293a4b5c6d7e8f9",
            "Sentry-Hook-Resource": "event_alert",
            "Sentry-Hook-Timestamp": "1795362221",
        },
        payload={
            "action": "triggered",
            "actor": {"id": "sentry", "name": "Sentry", "type": "application"},
            "data": {
                "event": {
                    "event_id": "4c1e6f1d2a1011f19a530242ac120005",
                    "issue_id": "5001",
                    "project": 6001,
                    "title": "KeyError: 'total'",
                    "culprit": "shop.views in checkout",
                    "level": "error",
                    "platform": "python",
                    "environment": "production",
                    "release": "shop@1.4.2",
                    "datetime": "2026-11-22T15:43:41.213000Z",
                    "url": "https://sentry.io/api/0/projects/octo/shop/events/4c1e6f1d2a10/",
                    "web_url": "https://sentry.io/organizations/octo/issues/5001/events/4c1e6f1d2a10/",
                    "issue_url": "https://sentry.io/api/0/issues/5001/",
                },
                "triggered_rule": "Many errors at the checkout",
            },
            "installation": {"uuid": "7f000001-4c1e-11f1-9a53-0242ac120005"},
        },
    ),
    Sample(
        key="generic",
        title="Any program: text, id and source",
        payload={"text": "The backup is done", "id": "backup-42", "source": "backup"},
    ),
)

_by_key: Final = {sample.key: sample for sample in SAMPLES}
