"""Who may come in: gateway tokens and users; and the nodes that said they are there."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import Any

from django import forms
from django.contrib import admin
from django.contrib.auth.models import Group, User
from django.http import HttpRequest

from wake import tokens
from wake.admin.screens import (
    NOTHING,
    ReadOnlyPage,
    TokenPage,
    block,
    moment,
)
from wake.admin.unfold_bases import (
    AdminPasswordChangeForm,
    GroupPage,
    ModelForm,
    UnfoldAdminCheckboxSelectMultipleWidget,
    UserChangeForm,
    UserCreationForm,
    UserPage,
)
from wake.gateway import example
from wake.models import GatewayToken, OperatorScope, PresenceEntry, every_scope


class GatewayTokenForm(ModelForm):
    scopes = forms.MultipleChoiceField(
        choices=OperatorScope.choices,
        initial=every_scope,
        widget=UnfoldAdminCheckboxSelectMultipleWidget,
        help_text="What the token may be used for; nothing beside its agent, if there is one.",
        required=False,
    )

    def clean(self) -> dict[str, Any] | None:
        cleaned = super().clean()
        if not self.cleaned_data.get("scopes") and not self.cleaned_data.get("agent"):
            self.add_error("scopes", "Choose at least one scope, or an agent.")
        return cleaned


@admin.register(GatewayToken)
class GatewayTokenAdmin(TokenPage):
    form = GatewayTokenForm
    list_display = ("name", "token", "state", "holds", "created", "expires", "last_used")

    def get_fields(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:
        may_change = obj is None or self.has_change_permission(request, obj)
        return (
            *super().get_fields(request, obj),
            *(("scopes", "agent") if may_change else ("holds",)),
        )

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:
        return (*super().get_readonly_fields(request, obj), "holds")

    def make(self, entered: GatewayToken) -> tuple[GatewayToken, str]:
        return tokens.create_for_gateway(
            entered.name,
            scopes=entered.scopes,
            agent_id=entered.agent_id,
            expires_at=entered.expires_at,
        )

    def replace(self, name: str, *, keep_old: timedelta, now: datetime) -> tuple[GatewayToken, str]:
        return tokens.rotate_for_gateway(name, keep_old=keep_old, now=now)

    def example(self, request: HttpRequest, row: GatewayToken, token: str) -> str:
        address = request.build_absolute_uri("/ws").replace("http", "ws", 1)
        return example.command_line(row, token, address)

    @admin.display(description="opens")
    def holds(self, row: GatewayToken) -> str:
        return tokens.held_in_words(row)


@admin.register(PresenceEntry)
class PresenceEntryAdmin(ReadOnlyPage):
    list_display = ("key", "host", "ip", "version", "mode", "reason", "seen")
    search_fields = ("key", "host", "ip")
    ordering = ("-seen_at",)
    fields = ("key", ("host", "ip"), ("version", "mode"), "reason", "said", "facts", "seen")
    readonly_fields = ("said", "facts", "seen")

    @admin.display(description="seen", ordering="seen_at")
    def seen(self, row: PresenceEntry) -> str:
        return moment(row.seen_at)

    @admin.display(description="text")
    def said(self, row: PresenceEntry) -> str:
        return block(row.text)

    @admin.display(description="details")
    def facts(self, row: PresenceEntry) -> str:
        return (
            block(json.dumps(row.details, indent=2, ensure_ascii=False)) if row.details else NOTHING
        )


admin.site.unregister(User)
admin.site.unregister(Group)


@admin.register(User)
class UserAdmin(UserPage):
    form = UserChangeForm
    add_form = UserCreationForm
    change_password_form = AdminPasswordChangeForm
    list_display = ("username", "is_active", "is_staff", "is_superuser", "last_login")


@admin.register(Group)
class GroupAdmin(GroupPage):
    pass
