"""What proves who sent a hook: a bearer token, or a mapping's signature. Pure.

Both are looked for in the configuration's snapshot. A credential opens every hook, or only some
mappings; to it the others do not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Final

import msgspec

from hooks.configuration import HookConfiguration, MappingConfiguration, TokenConfiguration
from hooks.errors import CredentialInQuery
from hooks.models import ENDPOINTS
from hooks.signatures import is_signed
from wake.tokens import digest

TOKEN_HEADER: Final = "x-openclaw-token"  # noqa: S105 - the name of a header


class Credential(msgspec.Struct, frozen=True):
    """A credential that is right.

    `name` is for people. `key` tells it from all others. `mappings` are the ids of the mappings
    that it opens; None for every hook, the endpoints `wake` and `agent` included. `token_id` is
    the row of a token that is stored, `scheme` that of a signature.
    """

    name: str
    key: str
    mappings: frozenset[int] | None = None
    token_id: int | None = None
    scheme: str = ""

    def opens(self, mapping: MappingConfiguration) -> bool:
        """Whether the credential may use this mapping."""
        return self.mappings is None or mapping.id in self.mappings


def refuse_in_query(query: Iterable[str]) -> None:
    """Raise CredentialInQuery for a token in the URL, where logs and proxies would keep it."""
    if any(name.lower() == "token" for name in query):
        raise CredentialInQuery(
            "a token in the URL is not accepted; send it as Authorization: Bearer TOKEN"
        )


def shown_tokens(headers: Mapping[str, str]) -> Iterator[str]:
    """Yield the tokens that a request shows. `headers` are by lower-case name."""
    scheme, _, credential = headers.get("authorization", "").strip().partition(" ")
    if scheme.lower() == "bearer" and (token := credential.strip()):
        yield token
    if token := headers.get(TOKEN_HEADER, "").strip():
        yield token


def find(
    hooks: HookConfiguration,
    path: str,
    on_path: Sequence[MappingConfiguration],
    headers: Mapping[str, str],
    read_body: Callable[[], bytes],
    now: datetime,
) -> Credential | None:
    """Return the right credential that a request shows, or None.

    `on_path` are the mappings on the request's path. Of several, such as a limited token beside a
    signature, it is one that opens something there, if there is one. The body is asked for only
    where a signature may have to do. Raises what `read_body` raises.
    """
    opening = on_path if path not in ENDPOINTS else ()
    right: list[Credential] = []
    for token in usable_tokens(hooks, headers, now):
        credential = of_token(token)
        if credential.mappings is None or any(map(credential.opens, opening)):
            return credential
        right.append(credential)
    signed = [mapping for mapping in opening if mapping.signature]
    by_signature = of_signature(signed, headers, read_body(), now) if signed else None
    return by_signature or next(iter(right), None)


def usable_tokens(
    hooks: HookConfiguration, headers: Mapping[str, str], now: datetime
) -> Iterator[TokenConfiguration]:
    """Yield the tokens that a request shows and that are valid.

    Looking a hash up tells nothing about how much of a wrong token was right.
    """
    for shown in shown_tokens(headers):
        token = hooks.tokens.get(digest(shown))
        if token and token.is_valid(now):
            yield token


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
        scheme=signed[0].signature.scheme if signed[0].signature else "",
    )
