"""The session of a signed-in user as a credential: what each may do, and when it ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from django.conf import settings
from django.contrib.auth.models import Permission, User
from django.contrib.sessions.models import Session as WebSession
from django.test import Client
from pytest_django import Settings
from websockets.exceptions import ConnectionClosed

from tests.admin_browser import signed_in
from tests.wake.gateway_server import TOKEN, Json, Wire, connect_params
from wake.gateway.credentials import CREDENTIAL_ENDED
from wake.models import SystemEvent

READ = ["operator.read"]
WRITE = ["operator.read", "operator.write"]
ALL = ["operator.admin", "operator.read", "operator.write"]


def staff(*permissions: str) -> User:
    user = User.objects.create_user("nina", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=permissions))
    return user


def page_of(url: str) -> str:
    """Return the origin of the site that serves the WebSocket at `url`."""
    return url.replace("ws://", "http://").rstrip("/")


@contextmanager
def wire_of(client: Client, url: str, origin: str | None = "own") -> Iterator[Wire]:
    """Open a connection as a page would that this browser shows."""
    cookie = client.cookies[settings.SESSION_COOKIE_NAME].value if client.cookies else "none"
    headers = {"Cookie": f"{settings.SESSION_COOKIE_NAME}={cookie}; other=1"}
    if origin:
        headers["Origin"] = page_of(url) if origin == "own" else origin
    with Wire(url, additional_headers=headers) as wire:
        yield wire


def hello(wire: Wire, **changes: object) -> Json:
    answer = wire.call("connect", connect_params(**{"auth": None, **changes}))
    assert answer["ok"], answer
    granted: Json = answer["payload"]["auth"]
    return granted


def refused(wire: Wire, **changes: object) -> str:
    error = wire.error("connect", connect_params(**{"auth": None, **changes}))
    assert wire.close_code() == 1008
    return str(error["details"]["code"])


# --- What each gets -------------------------------------------------------------------------------


def test_staff_without_permission_may_read_and_nothing_else(gateway_url: str) -> None:
    with wire_of(signed_in(staff()), gateway_url) as wire:
        assert hello(wire) == {"role": "operator", "scopes": READ, "name": "user nina"}
        assert wire.payload("sessions.list")["sessions"] == []
        error = wire.error("wake", {"mode": "now", "text": "hello"})
        assert error == {
            "code": "FORBIDDEN",
            "message": "missing scope: operator.write",
            "details": {
                "code": "MISSING_SCOPE",
                "missingScope": "operator.write",
                "requiredScopes": ["operator.write"],
            },
        }
    assert SystemEvent.objects.count() == 0


def test_staff_with_the_change_permission_may_write(gateway_url: str) -> None:
    with wire_of(signed_in(staff("change_session")), gateway_url) as wire:
        assert hello(wire)["scopes"] == WRITE
        wire.payload("wake", {"mode": "now", "text": "hello"})
        assert wire.error("set-heartbeats", {"enabled": False})["code"] == "FORBIDDEN"


def test_a_superuser_may_do_everything(gateway_url: str) -> None:
    with wire_of(signed_in(User.objects.create_superuser("root")), gateway_url) as wire:
        assert hello(wire)["scopes"] == ALL
        assert wire.payload("set-heartbeats", {"enabled": True})["ok"] is True


def test_a_user_gets_no_scope_that_was_not_asked_for(gateway_url: str) -> None:
    with wire_of(signed_in(User.objects.create_superuser("root")), gateway_url) as wire:
        assert hello(wire, scopes=READ)["scopes"] == READ


def test_a_user_who_is_not_of_the_staff_has_no_credential(gateway_url: str) -> None:
    with wire_of(signed_in(User.objects.create_user("guest")), gateway_url) as wire:
        assert refused(wire) == "AUTH_TOKEN_MISSING"


@pytest.mark.parametrize("cookie", ["none", "x" * 32, "\u0000nul", "é"])
def test_who_is_signed_out_has_no_credential(gateway_url: str, cookie: str) -> None:
    headers = {
        "Origin": page_of(gateway_url),
        "Cookie": f"{settings.SESSION_COOKIE_NAME}={cookie}".encode().decode("latin-1"),
    }
    if "\u0000" in cookie:
        headers["Cookie"] = f'{settings.SESSION_COOKIE_NAME}="\\000nul-nul-nul"'
    with Wire(gateway_url, additional_headers=headers) as wire:
        assert refused(wire) == "AUTH_TOKEN_MISSING"


# --- Whose page it is -----------------------------------------------------------------------------


def test_a_page_from_elsewhere_is_refused_whoever_is_signed_in(gateway_url: str) -> None:
    browser = signed_in(User.objects.create_superuser("root"))
    with wire_of(browser, gateway_url, "https://evil.example") as wire:
        assert refused(wire) == "CONTROL_UI_ORIGIN_NOT_ALLOWED"
    with wire_of(browser, gateway_url, "https://evil.example") as wire:
        assert refused(wire, auth={"token": TOKEN}) == "CONTROL_UI_ORIGIN_NOT_ALLOWED"


def test_a_trusted_page_needs_a_token_of_its_own(gateway_url: str, settings: Settings) -> None:
    settings.CSRF_TRUSTED_ORIGINS = ["https://ui.example"]
    browser = signed_in(User.objects.create_superuser("root"))
    with wire_of(browser, gateway_url, "https://ui.example") as wire:
        assert refused(wire) == "AUTH_TOKEN_MISSING"
    with wire_of(browser, gateway_url, "https://ui.example") as wire:
        assert hello(wire, auth={"token": TOKEN})["scopes"] == ALL


def test_a_cookie_without_a_page_is_no_credential(gateway_url: str) -> None:
    browser = signed_in(User.objects.create_superuser("root"))
    with wire_of(browser, gateway_url, None) as wire:
        assert refused(wire) == "AUTH_TOKEN_MISSING"


def test_a_wrong_token_is_not_made_good_by_a_session(gateway_url: str) -> None:
    browser = signed_in(User.objects.create_superuser("root"))
    with wire_of(browser, gateway_url) as wire:
        assert refused(wire, auth={"token": "wrong"}) == "AUTH_TOKEN_MISMATCH"


# --- When it ends ---------------------------------------------------------------------------------


def _sign_out(user: User) -> None:
    WebSession.objects.all().delete()


def _deactivate(user: User) -> None:
    user.is_active = False
    user.save()


def _leave_staff(user: User) -> None:
    user.is_staff = False
    user.save()


def _lose_permission(user: User) -> None:
    user.user_permissions.clear()


def _change_password(user: User) -> None:
    user.set_password("another one")
    user.save()


def _be_deleted(user: User) -> None:
    user.delete()


@pytest.mark.parametrize(
    "end",
    [_sign_out, _deactivate, _leave_staff, _lose_permission, _change_password, _be_deleted],
    ids=lambda end: end.__name__.strip("_"),
)
def test_a_connection_ends_within_a_second_of_its_credential(gateway_url: str, end: object) -> None:
    user = staff("change_session")
    with wire_of(signed_in(user), gateway_url) as wire:
        assert hello(wire)["scopes"] == WRITE
        assert callable(end)
        end(user)
        with pytest.raises(ConnectionClosed) as closed:
            wire.response(1.5)
    assert closed.value.rcvd
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1008, CREDENTIAL_ENDED)


def test_a_connection_that_asked_for_less_outlives_what_it_does_not_use(gateway_url: str) -> None:
    user = staff("change_session")
    with wire_of(signed_in(user), gateway_url) as wire:
        hello(wire, scopes=READ)
        _lose_permission(user)
        with pytest.raises(TimeoutError):
            wire.response(1.2)
        assert wire.payload("health")["ok"] is True
