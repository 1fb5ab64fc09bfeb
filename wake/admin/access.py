"""Who may come in: gateway tokens and users; and the nodes that said they are there."""

from __future__ import annotations

import json

from django.contrib import admin
from django.contrib.auth.models import Group, User
from django.http import HttpRequest

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
    UserChangeForm,
    UserCreationForm,
    UserPage,
)
from wake.models import (
    GatewayToken,
    PresenceEntry,
)


@admin.register(GatewayToken)
class GatewayTokenAdmin(TokenPage):
    token_prefix = "ocg_"  # noqa: S105 - the beginning of every token, not one

    def example(self, request: HttpRequest, token: str) -> str:
        address = request.build_absolute_uri("/ws").replace("http", "ws", 1)
        # Not as an argument, which other users of the machine can see.
        return (
            f'export OPENCLAW_GATEWAY_TOKEN={token}\nmanage.py system_event "Hello" --url {address}'
        )


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
