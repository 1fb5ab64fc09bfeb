"""The hook policy: one page, and what it means in words."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar, Final

from django import forms
from django.contrib import admin
from django.core.exceptions import ValidationError
from django.http import HttpRequest

from hooks import policy as rules
from hooks.configuration import HookConfiguration
from hooks.errors import PolicyRefused
from hooks.models import AllowedSessionPrefix, HookPolicy, KeepBodies
from wake import configuration
from wake.admin.screens import OneRowPage, paragraphs
from wake.admin.unfold_bases import (
    InlineFormSet,
    ModelForm,
    TabularInline,
    UnfoldAdminCheckboxSelectMultipleWidget,
    UnfoldBooleanSwitchWidget,
)
from wake.configuration import GatewayConfiguration
from wake.dispatch import resolve_session
from wake.errors import WakeError
from wake.models import Agent
from wake.presentation import counted

CONFIRM_ANY_KEY: Final = "confirm_any_session_key"
CONFIRM_BASE_PATH: Final = "confirm_base_path"

# Stands for every key that a turn without one may get: no prefix that names an id will do.
_OWN_SESSION: Final = "hook:<random id>"


def policy_in_words(
    policy: HookPolicy,
    prefixes: Sequence[str],
    gateway: GatewayConfiguration,
    allowed_agents: Collection[str] = (),
) -> list[str]:
    """Return what the policy means for those who send hooks, the most important first. Pure."""
    if not policy.enabled:
        return ["Hooks are off: every request is answered with 404."]
    ways = " or ".join(prefixes)
    if policy.allow_request_session_key and prefixes:
        keys = f"Requests may choose a session key that starts with {ways}."
    elif policy.allow_request_session_key:
        keys = "Requests may choose any session key: whoever holds a token reaches every session."
    elif prefixes:
        keys = (
            "Requests may not choose a session key. The fixed key of a mapping must start with "
            f"{ways}."
        )
    else:
        keys = "Requests may not choose a session key. A mapping may have any fixed key."
    return [
        keys,
        _turns_in_words(policy, prefixes, gateway),
        f"Hooks reach {_agents_in_words(allowed_agents)}.",
        f"Hooks answer below {policy.base_path}/ and take bodies up to "
        f"{policy.max_body_bytes:,} bytes.",
        f"{_bodies_in_words(policy)} Deliveries are kept for "
        f"{counted(policy.keep_deliveries_days, 'day')}, and "
        f"{policy.keep_deliveries_count:,} at most; the others are removed once an hour.",
    ]


def _turns_in_words(
    policy: HookPolicy, prefixes: Sequence[str], gateway: GatewayConfiguration
) -> str:
    default = policy.default_session_key.strip()
    key = default or _OWN_SESSION
    goes = (
        f"A turn that names no session goes to {default}"
        if default
        else f"A turn that names no session gets one of its own, {_OWN_SESSION}"
    )
    hooks = HookConfiguration(prefixes=tuple(prefix.lower() for prefix in prefixes))
    try:
        if default:
            _, session = resolve_session(default, None, gateway)
            canonical = session.key if session else key
        else:
            canonical = f"agent:{gateway.default_agent}:{key}"
        rules.check_prefix(hooks, key, canonical)
    except PolicyRefused:
        way = "List its prefix." if default else "Set a default session, or list hook: as a prefix."
        return f"{goes}, which no listed prefix allows: it is refused. {way}"
    except WakeError as error:
        # A key of another agent than the default one is for turns that select that agent.
        return f"{goes}; without that agent selected it is refused ({error})."
    return f"{goes}."


def _agents_in_words(allowed: Collection[str]) -> str:
    if not allowed:
        return "every agent"
    names = ", ".join(sorted(allowed))
    return f"the agent {names} only" if len(allowed) == 1 else f"these agents only: {names}"


def _bodies_in_words(policy: HookPolicy) -> str:
    match policy.keep_bodies:
        case KeepBodies.ALWAYS:
            return "What was sent is kept, so that it can be looked into and replayed."
        case KeepBodies.FAILURES:
            return "What was sent is kept only of failures; nothing else can be replayed."
        case _:
            return "What was sent is not kept: nothing can be looked into or replayed."


class HookPolicyForm(ModelForm):
    allowed_agents = forms.ModelMultipleChoiceField(
        Agent.objects.order_by("pk"),
        required=False,
        label="Allowed agents",
        help_text=HookPolicy._meta.get_field("allowed_agents").help_text,
        widget=UnfoldAdminCheckboxSelectMultipleWidget,
    )
    confirm_any_session_key = forms.BooleanField(
        required=False,
        label="Any session key, without a list of prefixes",
        help_text="Needed only when no prefix is listed below: whoever holds a token may then "
        "write into every session.",
        widget=UnfoldBooleanSwitchWidget,
    )
    confirm_base_path = forms.BooleanField(
        required=False,
        label="Every sender will be given the new address",
        help_text="All hooks move with the base path: whoever sends to the old one gets 404 from "
        "then on.",
        widget=UnfoldBooleanSwitchWidget,
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if "base_path" in self.fields:
            # What the page compares with, to ask for the confirmation; also after an error.
            self.fields["base_path"].widget.attrs["data-stored"] = self.initial["base_path"]

    def clean(self) -> dict[str, Any] | None:
        cleaned = super().clean()
        moves = "base_path" in self.changed_data and "base_path" in self.cleaned_data
        if moves and not self.cleaned_data.get(CONFIRM_BASE_PATH):
            self.add_error(
                CONFIRM_BASE_PATH,
                f"Senders use {self.initial['base_path']} now. Confirm that each will be given "
                "the new address.",
            )
        return cleaned


class PrefixFormSet(InlineFormSet):
    """The prefixes, and with them the rule that needs both them and the policy."""

    def clean(self) -> None:
        super().clean()
        if any(self.errors):
            return
        kept = [
            str(form.cleaned_data["prefix"]).strip().lower()
            for form in self.forms
            if form.cleaned_data.get("prefix") and not self._is_deleted(form)
        ]
        if len(kept) != len(set(kept)):
            raise ValidationError("A prefix is listed twice; upper and lower case do not count.")
        # The policy as the form above would save it; `data` is what was sent with it.
        opens_all = self.instance.allow_request_session_key and not kept
        if opens_all and not self.data.get(CONFIRM_ANY_KEY):
            raise ValidationError(
                "Requests may choose the session, and no prefix limits which. List one, for "
                "example hook:, or confirm above that any session key may be chosen."
            )

    def _is_deleted(self, form: Any) -> bool:
        return bool(self.can_delete and form.cleaned_data.get("DELETE"))


class PrefixInline(TabularInline):
    """The prefixes are part of the policy: whoever may change the one may change the other."""

    model = AllowedSessionPrefix
    formset = PrefixFormSet
    extra = 1
    fields = ("prefix",)
    verbose_name_plural = "allowed session prefixes"

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        may_view = request.user.has_perm("hooks.view_hookpolicy")
        return may_view or self.has_change_permission(request, obj)

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return request.user.has_perm("hooks.change_hookpolicy")

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return self.has_change_permission(request, obj)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return self.has_change_permission(request, obj)


@admin.register(HookPolicy)
class HookPolicyAdmin(OneRowPage):
    form = HookPolicyForm
    inlines = (PrefixInline,)
    readonly_fields = ("now",)
    fieldsets = (
        (
            None,
            {
                "fields": (
                    "now",
                    "enabled",
                    ("base_path", "max_body_bytes"),
                    CONFIRM_BASE_PATH,
                )
            },
        ),
        (
            "What is kept of deliveries",
            {"fields": ("keep_bodies", ("keep_deliveries_days", "keep_deliveries_count"))},
        ),
        # Last, because the prefixes follow it.
        (
            "Where hooks may go",
            {
                "fields": (
                    "allowed_agents",
                    "default_session_key",
                    "allow_request_session_key",
                    CONFIRM_ANY_KEY,
                )
            },
        ),
    )
    conditional_fields: ClassVar = {
        CONFIRM_ANY_KEY: "allow_request_session_key == true",
        CONFIRM_BASE_PATH: "base_path != $root.base_path.dataset.stored",
    }
    change_form_outer_before_template = "admin/hooks/policy_links.html"

    def ensure_row(self) -> HookPolicy:
        return HookPolicy.ensure()

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        fieldsets = super().get_fieldsets(request, obj)
        if self.has_change_permission(request, obj):
            return fieldsets
        # Who only looks has nothing to confirm.
        confirmations = {CONFIRM_ANY_KEY, CONFIRM_BASE_PATH}
        return [
            (title, {"fields": [name for name in options["fields"] if name not in confirmations]})
            for title, options in fieldsets
        ]

    @admin.display(description="as it stands")
    def now(self, row: HookPolicy) -> str:
        # As it is stored: a form that is refused has changed the row that it shows.
        stored = HookPolicy.ensure()
        return paragraphs(
            policy_in_words(
                stored,
                list(stored.prefixes.values_list("prefix", flat=True)),
                configuration.gateway(),
                stored.allowed_agents.values_list("pk", flat=True),
            )
        )
