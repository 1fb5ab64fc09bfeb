"""The life of tokens of every kind, and what a gateway token holds."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.db import connection
from django.utils import timezone

from wake import tokens
from wake.gateway import scopes
from wake.models import GatewayToken, OperatorScope

pytestmark = pytest.mark.django_db

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
DAY = timedelta(days=1)


def make(*names: str) -> None:
    for name in names:
        tokens.create_for_gateway(name)


def rotate(name: str, keep_old: timedelta = DAY, now: datetime = NOW) -> GatewayToken:
    return tokens.rotate_for_gateway(name, keep_old=keep_old, now=now)[0]


def revoke(*names: str) -> set[str]:
    """Revoke these tokens and return the names of all that are revoked by that."""
    chosen = GatewayToken.objects.filter(name__in=names)
    return {token.name for token in tokens.revoke(chosen, NOW)}


def usable(now: datetime = NOW) -> set[str]:
    return {token.name for token in GatewayToken.objects.all() if tokens.is_usable(token, now)}


# --- Replaced and revoked -----------------------------------------------------------------------


def test_a_replaced_token_is_called_after_its_end() -> None:
    make("ci")
    rotate("ci")
    old = "ci (until 2026-11-23T12:00:00.000Z)"
    assert usable() == {"ci", old}
    assert usable(NOW + DAY) == {"ci"}


def test_a_token_with_the_longest_name_is_replaced_again_and_again() -> None:
    name = "n" * 100
    make(name)
    for days in range(3):
        rotate(name, now=NOW + days * DAY)
    names = {token.name for token in GatewayToken.objects.all()}
    assert len(names) == 4
    assert max(len(one) for one in names) == 100


def test_a_token_that_is_not_kept_is_revoked_for_good() -> None:
    make("ci")
    rotate("ci", timedelta(0))
    GatewayToken.objects.update(expires_at=None)
    assert usable() == {"ci"}


def test_an_expired_token_is_replaced_by_one_that_works() -> None:
    tokens.create_for_gateway("ci", expires_at=NOW - DAY)
    rotate("ci")
    assert usable() == {"ci"}


def test_what_is_wrong_with_the_new_one_leaves_the_old_one_as_it_was() -> None:
    make("ci")
    GatewayToken.objects.update(scopes=["operator.unheard-of"])
    before = GatewayToken.objects.values().get()
    with pytest.raises(ValidationError, match="is no scope"):
        rotate("ci")
    assert GatewayToken.objects.values().get() == before


def test_to_revoke_is_to_end_what_was_replaced_as_well() -> None:
    make("ci", "ci too", "CI")
    rotate("ci")
    rotate("ci", now=NOW + timedelta(hours=1))
    rotate("CI")
    assert revoke("ci") == {
        "ci",
        "ci (until 2026-11-23T12:00:00.000Z)",
        "ci (until 2026-11-23T13:00:00.000Z)",
    }
    # Those of a name that differs in its capital letters only are another's.
    assert usable() == {"ci too", "CI", "CI (until 2026-11-23T12:00:00.000Z)"}
    assert revoke("ci") == set()


def test_to_revoke_a_replaced_token_leaves_the_new_one() -> None:
    make("ci")
    rotate("ci")
    assert len(revoke("ci (until 2026-11-23T12:00:00.000Z)")) == 1
    assert usable() == {"ci"}


def test_an_expired_token_is_revoked_for_good_but_not_what_ended_by_itself() -> None:
    tokens.create_for_gateway("ci", expires_at=NOW - timedelta(hours=1))
    rotate("ci", now=NOW - 2 * DAY)
    GatewayToken.objects.filter(name="ci").update(expires_at=NOW)
    assert revoke("ci") == {"ci"}


# --- Scopes -------------------------------------------------------------------------------------


def test_the_scopes_of_tokens_are_those_of_the_protocol() -> None:
    assert set(OperatorScope.values) == set(scopes.ALL)


def test_a_token_of_a_process_that_knows_no_scopes_holds_all_of_them() -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO wake_gatewaytoken (name, digest, hint, created_at) "
            "VALUES (%s, %s, %s, %s)",
            ["old", "0" * 64, "ocg_", timezone.now()],
        )
    assert set(GatewayToken.objects.get().scopes) == set(scopes.ALL)


def test_no_two_tokens_share_their_list_of_scopes() -> None:
    GatewayToken().scopes.clear()
    assert GatewayToken().scopes


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        None,
        "operator.read",
        {"operator.read": True},
        ["operator.read", "operator.read"],
        ["read"],
        ["operator.*"],
        ["Operator.Read"],
        [["operator.read"]],
        [None],
    ],
)
def test_what_is_no_list_of_scopes_is_refused(wrong: Any) -> None:
    row = GatewayToken(name="x", digest="0" * 64, hint="ocg_", scopes=wrong)
    with pytest.raises(ValidationError) as refused:
        row.full_clean()
    assert set(refused.value.message_dict) == {"scopes"}
