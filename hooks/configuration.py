"""The configuration of the HTTP door as a frozen snapshot; see `wake.configuration`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Final

from django.conf import settings

from hooks.models import AllowedSessionPrefix, HookMapping, HookPolicy, HookToken
from hooks.template import EMPTY, Template, TemplateError
from wake.configuration import Snapshot
from wake.dispatch import Mode
from wake.tokens import digest

ENVIRONMENT_TOKEN: Final = "OPENCLAW_HOOKS_TOKEN"  # noqa: S105 - the name of a setting


@dataclass(frozen=True, slots=True)
class TokenConfiguration:
    """A token that is not revoked. The environment's has no row and no `id`."""

    id: int | None
    name: str
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class MappingConfiguration:
    """An enabled mapping, its templates parsed.

    `path` has no outer slashes; an empty one stands for every path. `fault` says what is wrong
    with a stored template: such a mapping matches and refuses, and the others work on.
    """

    name: str
    path: str = ""
    source: str = ""
    mode: Mode = Mode.NOW
    agent_id: str | None = None
    session_key: Template = EMPTY
    text: Template = EMPTY
    fault: str = ""


@dataclass(frozen=True, slots=True)
class HookConfiguration:
    """Policy, tokens by digest, and the enabled mappings in their order.

    `prefixes` are in lower case; `base_path` starts with a slash and ends without one.
    """

    enabled: bool = True
    base_path: str = "/hooks"
    allow_request_session_key: bool = False
    max_body_bytes: int = 256 * 1024
    prefixes: tuple[str, ...] = ()
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
    policy = HookPolicy.objects.first() or HookPolicy.ensure()
    return HookConfiguration(
        enabled=policy.enabled,
        base_path=policy.base_path,
        allow_request_session_key=policy.allow_request_session_key,
        max_body_bytes=policy.max_body_bytes,
        prefixes=tuple(
            prefix.lower()
            for prefix in AllowedSessionPrefix.objects.values_list("prefix", flat=True)
        ),
        tokens=MappingProxyType(_tokens()),
        mappings=tuple(_frozen(mapping) for mapping in HookMapping.objects.filter(enabled=True)),
    )


def _tokens() -> dict[str, TokenConfiguration]:
    tokens = {
        token.digest: TokenConfiguration(token.pk, token.name, token.expires_at)
        for token in HookToken.objects.filter(revoked_at__isnull=True)
    }
    if settings.OPENCLAW_HOOKS_TOKEN:
        tokens[digest(settings.OPENCLAW_HOOKS_TOKEN)] = TokenConfiguration(None, ENVIRONMENT_TOKEN)
    return tokens


def _frozen(mapping: HookMapping) -> MappingConfiguration:
    text = session_key = EMPTY
    fault = ""
    try:
        session_key = Template.parse(mapping.session_key)
        text = Template.parse(mapping.text_template)
    except TemplateError as error:
        fault = str(error)
    return MappingConfiguration(
        name=mapping.name,
        path=mapping.match_path.strip("/"),
        source=mapping.match_source,
        mode=Mode(mapping.mode),
        agent_id=mapping.agent_id,
        session_key=session_key,
        text=text,
        fault=fault,
    )


hooks: Snapshot[HookConfiguration] = Snapshot(read)
