"""What proves who sent a hook: a bearer token, or a mapping's signature. Pure.

Both are looked for in the configuration's snapshot. A credential opens every hook, or only some
mappings; to it the others do not exist.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from hooks.configuration import HookConfiguration, MappingConfiguration, TokenConfiguration
from hooks.errors import CredentialInQuery
from hooks.signatures import is_signed
from wake.tokens import digest

TOKEN_HEADER: Final = "x-openclaw-token"  # noqa: S105 - the name of a header


@dataclass(frozen=True, slots=True)
class Credential:
    """A credential that is right.

    `name` is for people. `key` tells it from all others. `mappings` are the ids of the mappings
    that it opens; None for every hook, the endpoints `wake` and `agent` included. `token_id` is
    the row of a token that is stored.
    """

    name: str
    key: str
    mappings: frozenset[int] | None = None
    token_id: int | None = None

    def opens(self, mapping: MappingConfiguration) -> bool:
        """Whether the credential may use this mapping."""
        return self.mappings is None or mapping.id in self.mappings


def refuse_in_query(query: Container[str]) -> None:
    """Raise CredentialInQuery for a token in the URL, where logs and proxies would keep it."""
    if "token" in query:
        raise CredentialInQuery(
            "a token in the URL is not accepted; send it as Authorization: Bearer TOKEN"
        )


def shown_tokens(headers: Mapping[str, str]) -> Iterator[str]:
    """Yield the tokens that a request shows. `headers` are by lower-case name."""
    scheme, _, credential = headers.get("authorization", "").strip().partition(" ")
    if scheme.lower() == "bearer" and credential.strip():
        yield credential.strip()
    if token := headers.get(TOKEN_HEADER, "").strip():
        yield token


def usable_token(
    hooks: HookConfiguration, headers: Mapping[str, str], now: datetime
) -> TokenConfiguration | None:
    """Return the first token that a request shows and that is valid, or None.

    Looking a hash up tells nothing about how much of a wrong token was right.
    """
    for shown in shown_tokens(headers):
        token = hooks.tokens.get(digest(shown))
        if token and (token.expires_at is None or token.expires_at > now):
            return token
    return None


def of_token(token: TokenConfiguration) -> Credential:
    """Return the credential that a valid token is."""
    key = f"token:{token.id or token.name}"
    return Credential(f"token {token.name}", key, token.mappings, token.id)


def of_signature(
    mappings: Iterable[MappingConfiguration],
    headers: Mapping[str, str],
    body: bytes,
    now: datetime,
) -> Credential | None:
    """Return the credential that a request's signature is, or None when it has no right one.

    `mappings` are those on the request's path. It opens all of them that it is right for: two may
    share a secret, and their sources tell them apart.
    """
    signed = [
        mapping
        for mapping in mappings
        if mapping.signature and is_signed(mapping.signature, headers, body, now)
    ]
    if not signed:
        return None
    return Credential(
        f"signature of {signed[0].name}",
        f"mapping:{signed[0].id}",
        frozenset(mapping.id for mapping in signed),
    )
