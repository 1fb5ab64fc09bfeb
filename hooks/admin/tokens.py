"""The tokens that hooks are sent with."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, ClassVar, Final

from django import forms
from django.contrib import admin, messages
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.html import format_html, format_html_join

from hooks import curl, tokens
from hooks.models import HookMapping, HookPolicy, HookToken
from wake.admin.screens import TokenPage, badge, link_by_key
from wake.admin.unfold_bases import ModelForm, UnfoldAdminCheckboxSelectMultipleWidget

# So many mappings of a token are named in the list.
NAMED_MAPPINGS: Final = 3


class HookTokenForm(ModelForm):
    # Written out, so that Django does not wrap the widget: Unfold's script takes a wrapped one for
    # a single switch, and would show all boxes ticked as soon as one is.
    mappings = forms.ModelMultipleChoiceField(
        HookMapping.objects.all(),
        required=False,
        widget=UnfoldAdminCheckboxSelectMultipleWidget,
        help_text="What the token may use.",
    )


@admin.register(HookToken)
class HookTokenAdmin(TokenPage):
    form = HookTokenForm
    list_display = ("name", "token", "state", "opens", "created", "expires", "last_used")
    list_filter = (*TokenPage.list_filter, "limited")
    conditional_fields: ClassVar = {"mappings": "limited == true"}

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        return super().get_queryset(request).prefetch_related("mappings")

    def get_fields(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:
        return (*super().get_fields(request, obj), "limited", "mappings")

    def make(self, entered: HookToken) -> tuple[HookToken, str]:
        # The chosen mappings are added when it is there; until then it opens less, not more.
        mappings = () if entered.limited else None
        return tokens.create(entered.name, expires_at=entered.expires_at, mappings=mappings)

    def replace(self, name: str, *, keep_old: timedelta, now: datetime) -> tuple[HookToken, str]:
        return tokens.rotate(name, keep_old=keep_old, now=now)

    def save_related(self, request: HttpRequest, form: Any, formsets: Any, change: bool) -> None:
        super().save_related(request, form, formsets, change)
        row: HookToken = form.instance
        if row.limited and not row.mappings.exists():
            self.message_user(
                request,
                f"Token {row.name} opens nothing: it is limited to mappings, and none is chosen.",
                messages.WARNING,
            )

    def example(self, request: HttpRequest, row: HookToken, token: str) -> str:
        address = request.build_absolute_uri(HookPolicy.ensure().base_path)
        return curl.for_token(row, token, address)

    @admin.display(description="opens")
    def opens(self, row: HookToken) -> str:
        if not row.limited:
            return "every hook"
        mappings = list(row.mappings.all())
        if not mappings:
            return badge("nothing", "warning", "It is limited to mappings, and none is chosen.")
        links = [link_by_key(HookMapping, one.pk, one.name) for one in mappings[:NAMED_MAPPINGS]]
        named = format_html_join(", ", "{}", ((one,) for one in links))
        more = len(mappings) - NAMED_MAPPINGS
        return format_html("{} and {} more", named, more) if more > 0 else named
