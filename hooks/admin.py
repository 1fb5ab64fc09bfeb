"""The admin's pages of the HTTP door: its policy, its mappings, its tokens."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any, ClassVar

from django import forms
from django.contrib import admin, messages
from django.core.exceptions import ValidationError
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.html import format_html

from hooks import tokens
from hooks.models import AllowedSessionPrefix, HookMapping, HookPolicy, HookToken
from wake.admin.screens import (
    OneRowPage,
    Page,
    TokenPage,
    code,
    link_by_key,
    paragraphs,
)
from wake.admin.unfold_bases import (
    InlineFormSet,
    ModelForm,
    TabularInline,
    UnfoldBooleanSwitchWidget,
)
from wake.models import Agent
from wake.presentation import counted, first_line

CONFIRMATION = "confirm_any_session_key"


def policy_in_words(policy: HookPolicy, prefixes: Sequence[str]) -> list[str]:
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
        f"Hooks answer below {policy.base_path}/ and take bodies up to "
        f"{policy.max_body_bytes:,} bytes.",
    ]


class HookPolicyForm(ModelForm):
    confirm_any_session_key = forms.BooleanField(
        required=False,
        label="Any session key, without a list of prefixes",
        help_text="Needed only when no prefix is listed below: whoever holds a token may then "
        "write into every session.",
        widget=UnfoldBooleanSwitchWidget,
    )


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
        if opens_all and not self.data.get(CONFIRMATION):
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
                    "allow_request_session_key",
                    CONFIRMATION,
                )
            },
        ),
    )
    conditional_fields: ClassVar = {CONFIRMATION: "allow_request_session_key == true"}

    def ensure_row(self) -> HookPolicy:
        return HookPolicy.ensure()

    @admin.display(description="as it stands")
    def now(self, row: HookPolicy) -> str:
        prefixes = [prefix.prefix for prefix in row.prefixes.all()]
        return paragraphs(policy_in_words(row, prefixes))


@admin.register(HookToken)
class HookTokenAdmin(TokenPage):
    token_prefix = tokens.PREFIX

    def example(self, request: HttpRequest, token: str) -> str:
        address = request.build_absolute_uri(f"{HookPolicy.ensure().base_path}/wake")
        headers = (f"Authorization: Bearer {token}", "Content-Type: application/json")
        parts = [f"curl {shlex.quote(address)}", *(f"-H {shlex.quote(line)}" for line in headers)]
        parts.append(f"-d {shlex.quote(json.dumps({'text': 'Hello from outside'}))}")
        return " \\\n  ".join(parts)


@admin.register(HookMapping)
class HookMappingAdmin(Page):
    list_display = ("position", "name", "enabled", "path", "does", "key", "agent_link")
    list_display_links = ("name",)
    list_filter = ("enabled", "action")
    search_fields = ("name", "match_path", "session_key")
    search_help_text = "Name, path or session key"
    ordering = ("position", "pk")
    actions = ("enable", "disable")
    save_as = True
    fieldsets = (
        (None, {"fields": (("name", "position"), "enabled")}),
        (
            "Match",
            {
                "fields": ("match_path", "match_source"),
                "description": "The first enabled mapping that matches acts, in the order of the "
                "positions.",
            },
        ),
        (
            "What it does",
            {
                "fields": (("action", "mode"), "text_template"),
                "description": "Templates are filled from the request: {{payload.a.b}}, "
                "{{messages[0].subject}}, {{headers.x-event}}, {{query.kind}}, {{path}}, {{now}}. "
                "What is missing renders empty; a text that renders empty is refused.",
            },
        ),
        (
            "Where it goes",
            {
                "fields": ("session_key", "agent"),
                "description": "A key that is a template is only used if the hook policy lets "
                "requests choose the session.",
            },
        ),
    )

    def buttons_for(self, request: HttpRequest, row: HookMapping) -> tuple[str, ...]:
        return ("disable",) if row.enabled else ("enable",)

    @admin.action(description="Enable", permissions=["operate"])
    def enable(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        enabled = []
        for mapping in queryset.filter(enabled=False):
            mapping.enabled = True
            try:
                mapping.full_clean()
            except ValidationError as error:
                reasons = " ".join(error.messages)
                self.message_user(
                    request, f"{mapping.name} stays disabled: {reasons}", messages.ERROR
                )
                continue
            mapping.save(update_fields=["enabled"])
            enabled.append(mapping)
        self._say(request, enabled, "enabled")

    @admin.action(description="Disable", permissions=["operate"])
    def disable(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        disabled = list(queryset.filter(enabled=True))
        for mapping in disabled:
            mapping.enabled = False
            mapping.save(update_fields=["enabled"])
        self._say(request, disabled, "disabled")

    def _say(self, request: HttpRequest, mappings: list[HookMapping], done: str) -> None:
        self.record(request, mappings, f"{done.capitalize()}.")
        level = messages.SUCCESS if mappings else messages.INFO
        self.message_user(request, f"{counted(len(mappings), 'mapping')} {done}.", level)

    @admin.display(description="path", ordering="match_path")
    def path(self, row: HookMapping) -> str:
        path = code(row.match_path) if row.match_path else "every path"
        if not row.match_source:
            return path
        return format_html(
            '{}<span class="wake-beside">source is {}</span>', path, row.match_source
        )

    @admin.display(description="does", ordering="action")
    def does(self, row: HookMapping) -> str:
        return f"{row.action}, {row.mode}"

    @admin.display(description="session key")
    def key(self, row: HookMapping) -> str:
        return code(first_line(row.session_key, 80)) if row.session_key else "none: fans out"

    @admin.display(description="agent", ordering="agent")
    def agent_link(self, row: HookMapping) -> str:
        return link_by_key(Agent, row.agent_id, row.agent_id) if row.agent_id else "default"
