"""Signed requests through the HTTP door: which mapping they open, and which not."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.db import connection
from django.http import HttpResponse
from django.test import Client

from hooks import tokens
from hooks.models import HookDelivery, HookMapping, HookToken
from hooks.signatures import SignatureConfiguration, sign
from tests.hooks.conftest import Send, error_of, rows
from wake.models import SystemEvent
from wake.signing import new_signing_secret

pytestmark = pytest.mark.django_db

SECRET = "It's a Secret to Everybody"
BODY = b'{"action": "opened",  "text": "hi"}'


def add(name: str = "GitHub", path: str = "github", **values: Any) -> HookMapping:
    return HookMapping.objects.create(
        **{
            "name": name,
            "match_path": path,
            "text_template": "{{action}}",
            "signature_scheme": "github",
            "signing_secret": SECRET,
            **values,
        }
    )


def post(headers: Mapping[str, str], body: bytes = BODY, path: str = "github") -> HttpResponse:
    return Client().post(  # type: ignore[return-value] # the client's response is one
        f"/hooks/{path}", body, content_type="application/json", headers=dict(headers)
    )


def by_openssl(body: bytes, secret: str = SECRET) -> dict[str, str]:
    """Sign as GitHub does, with a program that is not ours."""
    command = ["openssl", "dgst", "-sha256", "-hmac", secret]
    signed = subprocess.run(command, input=body, capture_output=True, check=True).stdout
    return {"X-Hub-Signature-256": "sha256=" + signed.decode().split()[-1]}


def test_a_request_signed_by_openssl_needs_no_token() -> None:
    add()
    response = post(by_openssl(BODY))
    assert response.status_code == 200
    assert SystemEvent.objects.get().text == "opened"
    delivery = HookDelivery.objects.get()
    assert delivery.credential == "signature of GitHub"
    assert delivery.credential_mappings == [delivery.mapping_id]


@pytest.mark.parametrize("place", range(len(BODY)))
def test_one_changed_byte_is_a_401(place: int) -> None:
    add()
    changed = bytearray(BODY)
    changed[place] ^= 1
    response = post(by_openssl(BODY), bytes(changed))
    assert (response.status_code, response.content) == (401, b"Unauthorized\n")
    assert (rows(), HookDelivery.objects.count()) == ((0, 0, 0), 0)


def test_the_signature_is_checked_before_anything_is_parsed() -> None:
    add()
    assert post(by_openssl(b"{"), b"{").status_code == 400
    assert post(by_openssl(b"x"), b"{").status_code == 401


@pytest.mark.parametrize("scheme", ["standard-webhooks", "stripe", "slack"])
@pytest.mark.parametrize(("age", "status"), [(0, 200), (-290, 200), (360, 401), (-360, 401)])
def test_timed_schemes_take_five_minutes(scheme: str, age: int, status: int) -> None:
    secret = new_signing_secret()
    add(signature_scheme=scheme, signing_secret=secret)
    at = datetime.now(UTC) - timedelta(seconds=age)
    assert post(sign(SignatureConfiguration(scheme, (secret,)), BODY, at)).status_code == status


def test_the_public_library_signs_and_this_takes_it() -> None:
    from standardwebhooks import Webhook

    secret = new_signing_secret()
    add(signature_scheme="standard-webhooks", signing_secret=secret)
    now = datetime.now(UTC)
    headers = {
        "webhook-id": "msg_1",
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": f"v1,bm9uc2Vuc2U= {Webhook(secret).sign('msg_1', now, BODY.decode())}",
    }
    assert post(headers).status_code == 200
    assert json.loads(post(headers).content)["eventOutcome"] == "replayed"


def test_both_secrets_work_during_a_rotation() -> None:
    mapping = add(signing_secret="the new secret", previous_signing_secret="the old secret")
    for secret in ("the new secret", "the old secret"):
        assert post(by_openssl(BODY, secret)).status_code == 200
    mapping.previous_signing_secret = ""
    mapping.save()
    assert post(by_openssl(BODY, "the new secret")).status_code == 200
    assert post(by_openssl(BODY, "the old secret")).status_code == 401


def test_slack_is_told_its_challenge_and_nothing_is_stored() -> None:
    add("Slack", "slack", signature_scheme="slack")
    body = b'{"type": "url_verification", "challenge": "3eZbrw1aB"}'
    slack = SignatureConfiguration("slack", (SECRET,))
    response = post(sign(slack, body, datetime.now(UTC)), body, "slack")
    assert (response.status_code, response.content) == (200, b"3eZbrw1aB")
    assert response["Content-Type"].startswith("text/plain")
    assert rows() == (0, 0, 0)
    assert HookDelivery.objects.get().outcome == "answered"
    assert post({}, body, "slack").status_code == 401


def test_a_signature_opens_its_mapping_alone(send: Send) -> None:
    add("A", session_key="hook:a", signing_secret="secret of a")
    add("B", session_key="hook:b", signing_secret="secret of b", position=1)
    add("C", "elsewhere", session_key="hook:c", signing_secret="secret of c")
    for secret, key in (("secret of a", "a"), ("secret of b", "b")):
        answer = json.loads(post(by_openssl(BODY, secret)).content)
        assert answer["sessionKey"] == f"agent:main:hook:{key}"
    assert post(by_openssl(BODY, "secret of c")).status_code == 401
    for path in ("wake", "agent", "nowhere"):
        assert post(by_openssl(BODY, "secret of a"), path=path).status_code == 401


def test_a_signed_mapping_that_does_not_match_is_a_404_and_another_ones_a_401() -> None:
    add("A", signing_secret="secret of a", match_source="a")
    assert post(by_openssl(BODY, "secret of a")).status_code == 404
    add("B", signing_secret="secret of b", position=1)
    assert post(by_openssl(BODY, "secret of a")).status_code == 401


def test_a_disabled_mappings_signature_opens_nothing() -> None:
    add(enabled=False)
    assert post(by_openssl(BODY)).status_code == 401


def test_a_token_is_taken_as_well(send: Send) -> None:
    add()
    assert send("/hooks/github", BODY).status_code == 200


def test_signing_secrets_are_encrypted_at_rest_and_not_shown() -> None:
    from hooks.configuration import hooks

    add(previous_signing_secret="an older secret")
    with connection.cursor() as cursor:
        cursor.execute("SELECT * FROM hooks_hookmapping")
        stored = repr(cursor.fetchall())
    for secret in (SECRET, "an older secret"):
        assert secret not in stored
        assert secret not in repr(hooks())


def test_a_secret_that_cannot_be_read_any_more_opens_nothing(settings: Any) -> None:
    add()
    settings.SECRET_KEY = "another one"
    assert post(by_openssl(BODY)).status_code == 401
    assert post(by_openssl(BODY, "")).status_code == 401


# --- Limited tokens -----------------------------------------------------------------------------


def limited(*mappings: HookMapping) -> str:
    token, shown = tokens.create("limited")
    token.limited = True
    token.save()
    token.mappings.set(mappings)
    return shown


def test_a_limited_token_opens_its_mappings_alone(send: Send) -> None:
    mine, other = add("mine", "ci"), add("other", "other")
    token = limited(mine)
    assert send("/hooks/ci", BODY, token=token).status_code == 200
    before = rows()
    for path in ("/hooks/other", "/hooks/wake", "/hooks/agent"):
        assert send(path, {"text": "x", "message": "x"}, token=token).status_code == 401
    assert rows() == before
    HookToken.objects.get(name="limited").mappings.add(other)
    assert send("/hooks/other", BODY, token=token).status_code == 200


def test_other_mappings_do_not_exist_for_it(send: Send) -> None:
    add("first", "ci", session_key="hook:first", position=0)
    second = add("second", "ci", session_key="hook:second", position=1)
    answer = json.loads(send("/hooks/ci", BODY, token=limited(second)).content)
    assert answer["sessionKey"] == "agent:main:hook:second"


def test_a_token_opens_nothing_once_its_only_mapping_is_gone(send: Send) -> None:
    mine = add("mine", "ci")
    token = limited(mine)
    mine.delete()
    add("mine", "ci")
    for path in ("/hooks/ci", "/hooks/wake"):
        assert send(path, {"text": "x", "action": "x"}, token=token).status_code == 401


def test_unknown_paths_are_unknown_to_it_too(send: Send) -> None:
    response = send("/hooks/nowhere", BODY, token=limited())
    assert (response.status_code, error_of(response)) == (
        404,
        "no hook mapping matches 'nowhere'",
    )


# --- Several credentials, and what they leave behind ----------------------------------------------


def test_a_credential_that_opens_nothing_here_does_not_hide_one_that_does(
    send: Send, hook_token: str
) -> None:
    add("mine", "ci")
    narrow = limited()
    both = {"Authorization": f"Bearer {narrow}", "X-OpenClaw-Token": hook_token}
    assert send("/hooks/wake", {"text": "x"}, token=None, headers=both).status_code == 200
    signed = {"Authorization": f"Bearer {narrow}", **by_openssl(BODY)}
    assert post(signed, path="ci").status_code == 200


@pytest.mark.parametrize("enabled", [True, False])
def test_a_signature_is_never_kept_or_shown_whatever_its_header_is_called(
    send: Send, enabled: bool
) -> None:
    shop = SignatureConfiguration("hmac", (SECRET,), header="X-Shop-Proof", encoding="base64")
    values = {"signature_header": "X-Shop-Proof", "signature_encoding": "base64"}
    text = "[{{headers.x-shop-proof}}]"
    mapping = add("shop", "shop", signature_scheme="hmac", text_template=text, **values)
    signed = sign(shop, BODY, datetime.now(UTC))
    if enabled:
        assert post(signed, path="shop").status_code == 200
    else:
        mapping.enabled = False
        mapping.save()
        send("/hooks/wake", {"text": "[]"}, headers=signed)
    assert SystemEvent.objects.get().text == "[]"
    assert signed["X-Shop-Proof"] not in repr(HookDelivery.objects.values())


@pytest.mark.parametrize("scheme", ["standard-webhooks", "stripe", "slack"])
def test_where_an_id_is_signed_no_other_one_makes_a_second_event(scheme: str) -> None:
    secret = new_signing_secret()
    add(path="", signature_scheme=scheme, signing_secret=secret, action="agent")
    body = b'{"action": "x", "id": "evt_1", "event_id": "Ev1"}'
    signed = sign(SignatureConfiguration(scheme, (secret,)), body, datetime.now(UTC))
    runs = {
        json.loads(post({**signed, **unsigned}, body, path).content)["runId"]
        for unsigned in ({}, {"Idempotency-Key": "a"}, {"X-GitHub-Delivery": "b"})
        for path in ("github", "elsewhere")
    }
    assert len(runs) == 1
    assert SystemEvent.objects.count() == 1


# --- Rows that this version does not understand ---------------------------------------------------


@pytest.mark.parametrize(
    "column",
    ["action", "mode", "signature_scheme", "signature_digest", "signature_encoding"],
)
def test_a_mapping_with_a_value_nobody_knows_breaks_itself_only(send: Send, column: str) -> None:
    hmac = {"signature_scheme": "hmac", "signature_header": "X-Proof"}
    bad, good = add("bad", "bad", **hmac), add("good", "good")
    HookMapping.objects.filter(pk=bad.pk).update(**{column: "zzz"})
    assert send("/hooks/good", BODY).status_code == 200
    assert post(by_openssl(BODY), path=good.match_path).status_code == 200
    refused = send("/hooks/bad", BODY)
    assert (refused.status_code, '"zzz" is not known here' in error_of(refused)) == (400, True)
    for headers in ({}, by_openssl(BODY), {"X-Proof": "aa"}):
        assert post(headers, path="bad").status_code == 401
