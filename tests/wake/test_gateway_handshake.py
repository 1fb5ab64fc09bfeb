"""The handshake: hello-ok, and every row of the protocol page's table of failures."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from django.utils import timezone
from pytest_django import Settings
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Origin

from tests.wake.gateway_server import TOKEN, Json, Wire, connect_params, connected, serving
from wake import configuration, tokens
from wake.gateway import scopes
from wake.gateway.connection import Connection
from wake.gateway.credentials import CREDENTIAL_ENDED
from wake.gateway.frames import EVENTS, MAX_HANDSHAKE_BYTES, MAX_PAYLOAD_BYTES
from wake.models import Agent, GatewaySettings, GatewayToken
from wake.websocket_protocol import GatewayWebSocketProtocol

# --- Taken ----------------------------------------------------------------------------------------


def test_the_server_speaks_first(untouched_gateway_url: str) -> None:
    with Wire(untouched_gateway_url) as one, Wire(untouched_gateway_url) as other:
        assert one.challenge["type"] == "event"
        assert one.challenge["event"] == "connect.challenge"
        assert abs(one.challenge["payload"]["ts"] - time.time() * 1000) < 60_000
        assert one.challenge["payload"]["nonce"] != other.challenge["payload"]["nonce"]


def test_hello_ok_is_what_the_protocol_page_says(untouched_gateway_url: str) -> None:
    with Wire(untouched_gateway_url) as wire:
        hello = wire.payload("connect", connect_params())
    assert hello["type"] == "hello-ok"
    assert hello["protocol"] == 4
    assert set(hello["server"]) == {"version", "connId"}
    assert {"wake", "system-event", "last-heartbeat", "set-heartbeats", "health"} <= set(
        hello["features"]["methods"]
    )
    assert hello["features"]["events"] == list(EVENTS)
    snapshot = hello["snapshot"]
    assert snapshot["presence"] == []
    assert snapshot["health"]["ok"] is True
    assert set(snapshot["stateVersion"]) == {"presence", "health"}
    assert all(isinstance(version, int) for version in snapshot["stateVersion"].values())
    assert isinstance(snapshot["uptimeMs"], int)
    assert snapshot["sessionDefaults"] == {
        "defaultAgentId": "main",
        "mainKey": "main",
        "mainSessionKey": "agent:main:main",
        "scope": "per-sender",
    }
    assert hello["auth"] == {
        "role": "operator",
        "scopes": ["operator.admin", "operator.read", "operator.write"],
        "name": "OPENCLAW_GATEWAY_TOKEN",
    }
    assert hello["policy"] == {
        "maxPayload": 26214400,
        "maxBufferedBytes": 52428800,
        "tickIntervalMs": 30000,
    }


def test_hello_ok_names_the_scope_global_as_it_is(gateway_url: str) -> None:
    GatewaySettings.objects.update(scope="global")
    configuration.gateway.forget()
    with Wire(gateway_url) as wire:
        defaults = wire.payload("connect", connect_params())["snapshot"]["sessionDefaults"]
    assert (defaults["scope"], defaults["mainSessionKey"]) == ("global", "global")


def test_the_root_and_ws_are_served_and_nothing_else(untouched_gateway_url: str) -> None:
    with connected(untouched_gateway_url + "ws"):
        pass
    with pytest.raises(InvalidStatus) as refused:
        Wire(untouched_gateway_url + "elsewhere")
    assert refused.value.response.status_code == 403


@pytest.mark.parametrize(("oldest", "newest", "agreed"), [(3, 3, 3), (4, 4, 4), (1, 99, 4)])
def test_the_highest_common_protocol(
    untouched_gateway_url: str, oldest: int, newest: int, agreed: int
) -> None:
    params = connect_params(minProtocol=oldest, maxProtocol=newest)
    with Wire(untouched_gateway_url) as wire:
        assert wire.payload("connect", params)["protocol"] == agreed


@pytest.mark.parametrize(
    "auth", [{"token": TOKEN}, {"password": TOKEN}, {"token": "", "password": TOKEN}]
)
def test_the_shared_token_is_taken_in_either_field(untouched_gateway_url: str, auth: Json) -> None:
    with connected(untouched_gateway_url, auth=auth):
        pass


def test_a_stored_token_is_taken_until_it_is_revoked_or_expires(gateway_url: str) -> None:
    row, token = tokens.create(GatewayToken, "laptop", prefix="ocg_")
    with connected(gateway_url, auth={"token": token}):
        pass
    row.refresh_from_db()
    assert row.last_used_at

    row.expires_at = timezone.now() - timedelta(seconds=1)
    row.save()
    assert _refusal(gateway_url, auth={"token": token})["details"]["code"] == "AUTH_TOKEN_MISMATCH"

    row.expires_at, row.revoked_at = None, timezone.now()
    row.save()
    assert _refusal(gateway_url, auth={"token": token})["details"]["code"] == "AUTH_TOKEN_MISMATCH"


def test_a_connection_ends_with_its_token(gateway_url: str) -> None:
    row, token = tokens.create(GatewayToken, "laptop", prefix="ocg_")
    application = Connection.as_asgi(tick_seconds=0.1)
    with (
        connected(gateway_url, auth={"token": token}) as asking,
        serving(application) as url,
        connected(url, auth={"token": token}) as listening,
    ):
        assert asking.payload("health")["ok"] is True
        assert listening.event("tick")
        GatewayToken.objects.filter(pk=row.pk).update(revoked_at=timezone.now())
        deadline = time.monotonic() + 1
        for ended in (asking, listening):
            with pytest.raises(ConnectionClosed) as closed:
                ended.response(2)
            assert closed.value.rcvd
            assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1008, CREDENTIAL_ENDED)
        assert time.monotonic() < deadline


def test_the_use_of_a_token_is_noted_once_a_minute(gateway_url: str) -> None:
    row, token = tokens.create(GatewayToken, "laptop", prefix="ocg_")
    recently, long_ago = (timezone.now() - timedelta(seconds=age) for age in (30, 90))
    for before, is_noted in ((recently, False), (long_ago, True)):
        GatewayToken.objects.update(last_used_at=before)
        with connected(gateway_url, auth={"token": token}):
            pass
        row.refresh_from_db()
        assert (row.last_used_at != before) is is_noted


@pytest.mark.parametrize(
    ("asked", "granted"),
    [
        (None, ["operator.admin", "operator.read", "operator.write"]),
        ([], ["operator.admin", "operator.read", "operator.write"]),
        (["operator.write"], ["operator.write"]),
        (["operator.approvals", "operator.read"], ["operator.approvals", "operator.read"]),
        (["root"], []),
    ],
)
def test_a_connection_gets_the_scopes_it_asked_for(
    untouched_gateway_url: str, asked: list[str] | None, granted: list[str]
) -> None:
    with Wire(untouched_gateway_url) as wire:
        hello = wire.payload("connect", connect_params(scopes=asked))
    assert hello["auth"]["scopes"] == granted


@pytest.mark.parametrize(
    ("held", "asked", "granted"),
    [
        ((scopes.READ,), ("operator.write", "operator.read"), ("operator.read",)),
        ((scopes.WRITE,), ("operator.read", "operator.admin"), ("operator.read",)),
        ((scopes.WRITE,), (), ("operator.write",)),
        ((), ("operator.read",), ()),
    ],
)
def test_no_connection_gets_more_than_its_credential_holds(
    held: tuple[str, ...], asked: tuple[str, ...], granted: tuple[str, ...]
) -> None:
    assert scopes.grant(asked, held) == granted


def test_unknown_fields_are_passed_over(untouched_gateway_url: str) -> None:
    with connected(
        untouched_gateway_url,
        commands=["x"],
        permissions={"camera": True},
        locale="en-US",
        userAgent="test",
        somethingNew=[1],
    ):
        pass


# --- Refused --------------------------------------------------------------------------------------


def _refusal(url: str, *, close_code: int = 1008, **changes: Any) -> Json:
    """Return the error that answers a connect; then the connection is closed."""
    with Wire(url) as wire:
        error = wire.error("connect", connect_params(**changes))
        assert wire.close_code() == close_code
    assert error["code"] == "INVALID_REQUEST"
    return error


@pytest.mark.parametrize("auth", [{"token": "wrong"}, {"password": "wrong"}, {"token": "Ü\0\n"}])
def test_wrong_token(untouched_gateway_url: str, auth: Json) -> None:
    assert _refusal(untouched_gateway_url, auth=auth) == {
        "code": "INVALID_REQUEST",
        "message": "unauthorized: gateway token mismatch (provide gateway auth token)",
        "details": {
            "code": "AUTH_TOKEN_MISMATCH",
            "authReason": "token_mismatch",
            "canRetryWithDeviceToken": False,
            "recommendedNextStep": "update_auth_credentials",
        },
    }


def test_no_token_is_right_when_none_is_set(untouched_gateway_url: str, settings: Settings) -> None:
    settings.OPENCLAW_GATEWAY_TOKEN = ""
    assert _refusal(untouched_gateway_url)["details"]["code"] == "AUTH_TOKEN_MISMATCH"
    assert (
        _refusal(untouched_gateway_url, auth={"token": ""})["details"]["code"]
        == "AUTH_TOKEN_MISSING"
    )


@pytest.mark.parametrize("auth", [None, {}, {"token": ""}, {"token": None}])
def test_no_credential(untouched_gateway_url: str, auth: Json | None) -> None:
    error = _refusal(untouched_gateway_url, auth=auth)
    assert error["message"].startswith("unauthorized: gateway token missing")
    assert error["details"]["code"] == "AUTH_TOKEN_MISSING"


def test_first_request_is_not_connect(untouched_gateway_url: str) -> None:
    with Wire(untouched_gateway_url) as wire:
        assert wire.error("health") == {
            "code": "INVALID_REQUEST",
            "message": "invalid handshake: first request must be connect",
        }
        assert wire.close_code() == 1008


@pytest.mark.parametrize(("oldest", "newest"), [(5, 6), (1, 2), (4, 3)])
def test_no_common_protocol(untouched_gateway_url: str, oldest: int, newest: int) -> None:
    error = _refusal(untouched_gateway_url, close_code=1002, minProtocol=oldest, maxProtocol=newest)
    assert error["message"] == "protocol mismatch"
    assert error["details"] == {
        "code": "PROTOCOL_MISMATCH",
        "clientMinProtocol": oldest,
        "clientMaxProtocol": newest,
        "expectedProtocol": 4,
    }


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"minProtocol": None}, "minProtocol (integer) required"),
        ({"maxProtocol": "4"}, "maxProtocol (integer) required"),
        ({"client": None}, "client (object) required"),
        ({"client": {"id": "cli"}}, "client.version (string) required"),
        (
            {"client": {"id": "", "version": "1", "platform": "x", "mode": "cli"}},
            "client.id (non-empty string) required",
        ),
        ({"role": "node"}, 'role must be: "operator"'),
        ({"scopes": "operator.read"}, "scopes must be: array of strings"),
        ({"scopes": ["operator.read", 1]}, "scopes[0] must be: string"),
        ({"auth": {"token": 5}}, "auth.token must be: string"),
        ({"device": {"id": "x"}}, "device.publicKey (string) required"),
    ],
)
def test_bad_params(untouched_gateway_url: str, changes: Json, problem: str) -> None:
    message = _refusal(untouched_gateway_url, **changes)["message"]
    assert message.replace("[1]", "[0]") == f"invalid connect params: {problem}"


def test_params_that_are_no_object(untouched_gateway_url: str) -> None:
    with Wire(untouched_gateway_url) as wire:
        assert wire.error("connect", [1])["message"] == "invalid connect params: must be an object"
        assert wire.close_code() == 1008


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "http://console.example.com",
        "https://console.example.com.evil.example",
        "https://trusted.example.evil.example",
        "null",
        "http://127.0.0.1:1",
        "http://[",
        "",
    ],
)
def test_a_browser_from_elsewhere(
    untouched_gateway_url: str, settings: Settings, origin: str
) -> None:
    settings.CSRF_TRUSTED_ORIGINS = ["https://console.example.com", "https://*.trusted.example"]
    with Wire(untouched_gateway_url, origin=Origin(origin)) as wire:
        error = wire.error("connect", connect_params())
        assert wire.close_code() == 1008
    assert error["message"] == "origin not allowed"
    assert error["details"] == {"code": "CONTROL_UI_ORIGIN_NOT_ALLOWED"}


@pytest.mark.parametrize(
    "origin", ["https://console.example.com", "https://a.trusted.example", "OWN"]
)
def test_a_browser_of_this_site_or_a_trusted_one(
    untouched_gateway_url: str, settings: Settings, origin: str
) -> None:
    settings.CSRF_TRUSTED_ORIGINS = ["https://console.example.com", "https://*.trusted.example"]
    own = untouched_gateway_url.replace("ws://", "http://").rstrip("/")
    with Wire(untouched_gateway_url, origin=Origin(own if origin == "OWN" else origin)) as wire:
        wire.payload("connect", connect_params())


def test_a_page_is_not_this_sites_by_renaming_this_machine(
    untouched_gateway_url: str, settings: Settings
) -> None:
    """An outside name that resolves to this machine (DNS rebinding) is no allowed host."""
    settings.ALLOWED_HOSTS = ["gateway.example"]
    own = untouched_gateway_url.replace("ws://", "http://").rstrip("/")
    with Wire(untouched_gateway_url, origin=Origin(own)) as wire:
        assert wire.error("connect", connect_params())["message"] == "origin not allowed"


@pytest.mark.parametrize("frame", ["nonsense", "", '{"type":"req"', b"\x00\x01", b"{}"])
def test_not_json_or_a_binary_frame(untouched_gateway_url: str, frame: str | bytes) -> None:
    with Wire(untouched_gateway_url) as wire:
        wire.send(frame)
        assert wire.close_code() == 1008


@pytest.mark.parametrize("frame", ["[]", "5", '{"type":"event"}', "[" * 60_000])
def test_json_that_is_no_request(untouched_gateway_url: str, frame: str) -> None:
    with Wire(untouched_gateway_url) as wire:
        wire.send(frame)
        assert wire.close_code() == 1008


def test_a_request_without_a_method_is_answered(untouched_gateway_url: str) -> None:
    with Wire(untouched_gateway_url) as wire:
        wire.send({"type": "req", "id": "7"})
        assert wire.receive() == {
            "type": "res",
            "id": "7",
            "ok": False,
            "error": {
                "code": "INVALID_REQUEST",
                "message": "invalid request frame: method (non-empty string) required",
            },
        }
        assert wire.close_code() == 1008


def test_nothing_in_time() -> None:
    with serving(Connection.as_asgi(handshake_seconds=0.1)) as url, Wire(url) as wire:
        assert wire.close_code(5) == 1008


def test_the_time_limit_ends_with_the_handshake(untouched_gateway_url: str) -> None:
    application = Connection.as_asgi(handshake_seconds=0.5, tick_seconds=0.6)
    with serving(application) as url, connected(url) as wire:
        assert wire.event("tick")
        assert wire.payload("health")["ok"] is True


def test_a_frame_over_64_kib_before_hello(untouched_gateway_url: str) -> None:
    with Wire(untouched_gateway_url) as wire:
        wire.send(" " * (MAX_HANDSHAKE_BYTES + 1))
        assert wire.close_code() == 1009
    with Wire(untouched_gateway_url) as wire:
        params = connect_params(padding="x" * (MAX_HANDSHAKE_BYTES - 1000))
        assert wire.payload("connect", params)["type"] == "hello-ok"


@pytest.mark.parametrize("checked_by_the_server", [True, False])
def test_a_frame_over_max_payload_after_hello(
    untouched_gateway_url: str, checked_by_the_server: bool
) -> None:
    """Our protocol refuses it unread; under another one the gateway does."""
    protocol = GatewayWebSocketProtocol if checked_by_the_server else WebSocketsSansIOProtocol
    limit = MAX_HANDSHAKE_BYTES if checked_by_the_server else MAX_PAYLOAD_BYTES * 2
    application = Connection.as_asgi()
    with serving(application, ws=protocol, ws_max_size=limit) as url, connected(url) as wire:
        padding = " " * (MAX_PAYLOAD_BYTES - 1000)
        wire.send(json.dumps({"type": "req", "id": "7", "method": "health"}) + padding)
        assert wire.response()["ok"] is True
        wire.send(" " * (MAX_PAYLOAD_BYTES + 1))
        assert wire.close_code() == 1009


def test_a_token_that_holds_nothing_opens_nothing(gateway_url: str) -> None:
    row, token = tokens.create_for_gateway("empty")
    GatewayToken.objects.filter(pk=row.pk).update(scopes=[])
    assert _refusal(gateway_url, auth={"token": token})["details"]["code"] == "AUTH_TOKEN_MISMATCH"


def test_who_may_not_read_is_told_nothing_of_how_things_stand(untouched_gateway_url: str) -> None:
    with Wire(untouched_gateway_url) as wire:
        hello = wire.payload("connect", connect_params(scopes=["operator.pairing"]))
    assert (hello["snapshot"]["presence"], hello["snapshot"]["health"]) == ([], {})


def test_text_that_is_not_utf8_is_closed_and_fills_no_log(
    untouched_gateway_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Wire(untouched_gateway_url) as wire:
        wire.connection.socket.sendall(b"\x81\x82\0\0\0\0\xff\xfe")
        assert wire.close_code() == 1007
    assert "UnicodeDecodeError" not in caplog.text


def test_what_cannot_be_read_at_the_start_is_for_another_try(gateway_url: str) -> None:
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE wake_presenceentry RENAME TO elsewhere")
    try:
        with serving(Connection.as_asgi()) as url:  # where nothing was read before
            for _ in range(2):
                with Wire(url) as wire:
                    error = wire.error("connect", connect_params())
                    assert (error["code"], error["retryable"]) == ("UNAVAILABLE", True)
    finally:
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE elsewhere RENAME TO wake_presenceentry")


def test_a_database_that_fails_is_no_wrong_token(gateway_url: str) -> None:
    """What cannot be read now is for another try."""
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE wake_gatewaytoken RENAME TO elsewhere")
    try:
        with Wire(gateway_url) as wire:
            error = wire.error("connect", connect_params(auth={"token": "some"}))
            assert wire.close_code() == 1013
    finally:
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE elsewhere RENAME TO wake_gatewaytoken")
    assert (error["code"], error["retryable"]) == ("UNAVAILABLE", True)
    assert "wake_gatewaytoken" not in error["message"]


# --- Device proofs --------------------------------------------------------------------------------


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _device(
    key: Ed25519PrivateKey, nonce: str, *, version: str = "v2", signed_at: int | None = None
) -> Json:
    """Return a right proof for `connect_params(scopes=["operator.read", "operator.write"])`."""
    public = key.public_key().public_bytes_raw()
    device_id = hashlib.sha256(public).hexdigest()
    signed_at = signed_at if signed_at is not None else int(time.time() * 1000)
    text = (
        f"{version}|{device_id}|cli|cli|operator|operator.read,operator.write|{signed_at}|"
        f"{TOKEN}|{nonce}" + ("|linux|linux" if version == "v3" else "")
    )
    return {
        "id": device_id,
        "publicKey": _base64url(public),
        "signature": _base64url(key.sign(text.encode())),
        "signedAt": signed_at,
        "nonce": nonce,
    }


_SCOPES = ["operator.read", "operator.write"]


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_a_right_device_proof(untouched_gateway_url: str, version: str) -> None:
    with Wire(untouched_gateway_url) as wire:
        nonce = wire.challenge["payload"]["nonce"]
        device = _device(Ed25519PrivateKey.generate(), nonce, version=version)
        wire.payload("connect", connect_params(scopes=_SCOPES, device=device))


_DAY = 24 * 3600 * 1000


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda device: {"signature": device["signature"][::-1]}, "SIGNATURE_INVALID"),
        (lambda device: {"signature": "*"}, "SIGNATURE_INVALID"),
        (lambda device: {"signedAt": device["signedAt"] + 1}, "SIGNATURE_INVALID"),
        (lambda device: {"nonce": "another"}, "NONCE_MISMATCH"),
        (lambda device: {"signedAt": device["signedAt"] - _DAY}, "SIGNATURE_EXPIRED"),
        (lambda device: {"signedAt": device["signedAt"] + _DAY}, "SIGNATURE_EXPIRED"),
        (lambda device: {"id": "0" * 64}, "DEVICE_ID_MISMATCH"),
        (lambda device: {"publicKey": "Ü"}, "DEVICE_ID_MISMATCH"),
    ],
)
def test_bad_device_proof(
    untouched_gateway_url: str, spoil: Callable[[Json], Json], code: str
) -> None:
    with Wire(untouched_gateway_url) as wire:
        device = _device(Ed25519PrivateKey.generate(), wire.challenge["payload"]["nonce"])
        params = connect_params(scopes=_SCOPES, device={**device, **spoil(device)})
        error = wire.error("connect", params)
        assert wire.close_code() == 1008
    assert error["details"]["code"] == f"DEVICE_AUTH_{code}"


def test_a_right_device_proof_does_not_replace_the_token(untouched_gateway_url: str) -> None:
    with Wire(untouched_gateway_url) as wire:
        device = _device(Ed25519PrivateKey.generate(), wire.challenge["payload"]["nonce"])
        params = connect_params(scopes=_SCOPES, device=device, auth={"token": "wrong"})
        assert wire.error("connect", params)["details"]["code"].startswith("DEVICE_AUTH_")


def test_agents_are_named_in_health(gateway_url: str) -> None:
    Agent.objects.create(id="ops", name="Operations", paused=True)
    with connected(gateway_url) as wire:
        health = wire.payload("health")
    assert health["agents"][1] == {
        "id": "ops",
        "name": "Operations",
        "enabled": True,
        "paused": True,
        "runner": "none",
        "unreached": None,
        "isDefault": False,
    }
