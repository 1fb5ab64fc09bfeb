"""The configuration of the HTTP door as a frozen snapshot; see `wake.configuration`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from functools import lru_cache
from types import MappingProxyType
from typing import Final, TypeVar

from django.conf import settings
from django.db.models import TextChoices

from hooks import transforms
from hooks.models import (
    AllowedSessionPrefix,
    HookMapping,
    HookPolicy,
    HookToken,
    KeepBodies,
    SignatureScheme,
)
from hooks.signatures import SignatureConfiguration
from hooks.template import EMPTY, Template, TemplateError
from hooks.transforms import Transform
from wake.configuration import Snapshot, at_one_moment
from wake.dispatch import Mode
from wake.tokens import digest

Choice = TypeVar("Choice", bound=StrEnum | TextChoices)

ENVIRONMENT_TOKEN: Final = "OPENCLAW_HOOKS_TOKEN"  # noqa: S105 - the name of a setting


@dataclass(frozen=True, slots=True)
class TokenConfiguration:
    """A token that is not revoked. The environment's has no row and no `id`.

    `mappings` are the ids of those that it opens; None for every hook.
    """

    id: int | None
    name: str
    expires_at: datetime | None = None
    mappings: frozenset[int] | None = None

    def is_valid(self, now: datetime) -> bool:
        """Whether the token has not expired."""
        return self.expires_at is None or self.expires_at > now


@dataclass(frozen=True, slots=True)
class MappingConfiguration:
    """An enabled mapping, its templates parsed.

    `path` has no outer slashes; an empty one stands for every path. `fault` says what is wrong
    with what is stored: such a mapping matches and refuses, and the others work on.
    """

    id: int
    name: str
    path: str = ""
    source: str = ""
    signature: SignatureConfiguration | None = None
    action: HookMapping.Action = HookMapping.Action.WAKE
    mode: Mode = Mode.NOW
    agent_id: str | None = None
    session_key: Template = EMPTY
    for_each: str = ""
    transform: Transform | None = None
    text: Template = EMPTY
    deliver: bool = True
    timeout_seconds: int | None = None
    fault: str = ""


@dataclass(frozen=True, slots=True)
class HookConfiguration:
    """Policy, tokens by digest, and the enabled mappings in their order.

    `prefixes` are in lower case; `base_path` starts with a slash and ends without one; no
    `allowed_agents` means that hooks reach all of them. `signature_headers` are those of every
    mapping, enabled or not, in lower case: they prove who sent a request, whatever they are called.
    """

    enabled: bool = True
    base_path: str = "/hooks"
    allow_request_session_key: bool = False
    max_body_bytes: int = 256 * 1024
    prefixes: tuple[str, ...] = ()
    default_session_key: str = ""
    allowed_agents: frozenset[str] = frozenset()
    keep_bodies: KeepBodies = KeepBodies.ALWAYS
    signature_headers: frozenset[str] = frozenset()
    tokens: Mapping[str, TokenConfiguration] = field(default_factory=dict, repr=False)
    mappings: tuple[MappingConfiguration, ...] = ()

    def relative_path(self, path: str) -> str | None:
        """Return the path of a hook below the base path, without outer slashes.

        None when there is no hook at `path`: hooks are off, or it is the base path or elsewhere.
        """
        if not self.enabled or not path.startswith(f"{self.base_path}/"):
            return None
        return path.removeprefix(self.base_path).strip("/") or None


def read() -> HookConfiguration:
    """Read the configuration from the database."""
    with at_one_moment():
        if policy := HookPolicy.objects.first():
            return _configured(policy)
    return _configured(HookPolicy.ensure())


def _configured(policy: HookPolicy) -> HookConfiguration:
    mappings = list(HookMapping.objects.all())
    allowed = HookPolicy.allowed_agents.through.objects.filter(hookpolicy=policy)
    return HookConfiguration(
        enabled=policy.enabled,
        base_path=policy.base_path,
        allow_request_session_key=policy.allow_request_session_key,
        max_body_bytes=policy.max_body_bytes,
        prefixes=tuple(
            prefix.lower()
            for prefix in AllowedSessionPrefix.objects.values_list("prefix", flat=True)
        ),
        default_session_key=policy.default_session_key.strip(),
        allowed_agents=frozenset(allowed.values_list("agent_id", flat=True)),
        keep_bodies=_known(KeepBodies, policy.keep_bodies, KeepBodies.NEVER),
        signature_headers=frozenset(
            mapping.signature_header.lower() for mapping in mappings if mapping.signature_header
        ),
        tokens=MappingProxyType(_tokens()),
        mappings=tuple(frozen(mapping) for mapping in mappings if mapping.enabled),
    )


def _known(kind: type[Choice], stored: str, otherwise: Choice) -> Choice:
    """Return a stored choice; one that does not exist here (yet, or any more) is another one."""
    try:
        return kind(stored)
    except ValueError:
        return otherwise


# It is all read several times a second.
_template = lru_cache(maxsize=2048)(Template.parse)


def _tokens() -> dict[str, TokenConfiguration]:
    opened: dict[int, set[int]] = defaultdict(set)
    links = HookToken.mappings.through.objects.values_list("hooktoken_id", "hookmapping_id")
    for token_id, mapping_id in links:
        opened[token_id].add(mapping_id)
    tokens = {
        token.digest: TokenConfiguration(
            token.pk,
            token.name,
            token.expires_at,
            frozenset(opened[token.pk]) if token.limited else None,
        )
        for token in HookToken.objects.filter(revoked_at__isnull=True)
    }
    if settings.OPENCLAW_HOOKS_TOKEN:
        tokens[digest(settings.OPENCLAW_HOOKS_TOKEN)] = TokenConfiguration(None, ENVIRONMENT_TOKEN)
    return tokens


def frozen(mapping: HookMapping) -> MappingConfiguration:
    """Return a mapping as decisions see it; it need not be stored (its id is then 0).

    Never raises: what is wrong with it is its fault, and the others work on.
    """
    text = session_key = EMPTY
    transform = transforms.find(mapping.transform)
    fault = ""
    try:
        session_key = _template(mapping.session_key)
        text = _template(mapping.text_template)
    except TemplateError as error:
        fault = str(error)
    if mapping.transform and transform is None:
        fault = f'no transform is registered as "{mapping.transform}"'
    unknown = _unknown_value(mapping)
    if unknown is not None:
        fault = f'"{unknown}" is not known here'
    return MappingConfiguration(
        id=mapping.pk or 0,
        name=mapping.name,
        path=mapping.match_path.strip("/"),
        source=mapping.match_source,
        signature=_signature(mapping) if unknown is None else None,
        action=_known(HookMapping.Action, mapping.action, HookMapping.Action.WAKE),
        mode=_known(Mode, mapping.mode, Mode.NOW),
        agent_id=mapping.agent_id,
        session_key=session_key,
        for_each=mapping.for_each,
        transform=transform,
        text=text,
        deliver=mapping.deliver,
        timeout_seconds=mapping.timeout_seconds,
        fault=fault,
    )


def _unknown_value(mapping: HookMapping) -> str | None:
    """Return a stored choice that does not exist here (yet, or any more), or None."""
    stored: tuple[tuple[type[StrEnum | TextChoices], str], ...] = (
        (HookMapping.Action, mapping.action),
        (Mode, mapping.mode),
        (SignatureScheme, mapping.signature_scheme),
        (HookMapping.SignatureDigest, mapping.signature_digest),
        (HookMapping.SignatureEncoding, mapping.signature_encoding),
    )
    return next((value for kind, value in stored if value not in set(kind)), None)


def _signature(mapping: HookMapping) -> SignatureConfiguration | None:
    if not mapping.signature_scheme:
        return None
    # One that cannot be read any more (another SECRET_KEY) is empty: it opens nothing.
    secrets = (mapping.signing_secret, mapping.previous_signing_secret)
    return SignatureConfiguration(
        scheme=mapping.signature_scheme,
        secrets=tuple(secret for secret in secrets if secret),
        header=mapping.signature_header,
        prefix=mapping.signature_prefix,
        digest=mapping.signature_digest,
        encoding=mapping.signature_encoding,
    )


hooks: Snapshot[HookConfiguration] = Snapshot(
    read,
    [
        HookPolicy,
        HookPolicy.allowed_agents.through,
        AllowedSessionPrefix,
        HookToken,
        HookToken.mappings.through,
        HookMapping,
    ],
)
