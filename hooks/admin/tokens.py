"""The tokens that hooks are sent with."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, ClassVar, Final

from django import forms
from django.contrib import admin, messages
from django.contrib.admin.utils import unquote
from django.core.exceptions import PermissionDenied
from django.db import transaction
from django.db.models import QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils import timezone
from django.utils.html import format_html, format_html_join

from hooks import curl, tokens
from hooks.models import HookMapping, HookPolicy, HookToken
from wake.admin.screens import TokenPage, badge, link_by_key
from wake.admin.unfold_bases import (
    ModelForm,
    UnfoldAdminCheckboxSelectMultipleWidget,
    UnfoldAdminRadioSelectWidget,
)
from wake.durations import format_duration
from wake.tokens import digest

# So many mappings of a token are named in the list.
NAMED_MAPPINGS: Final = 3

KEEP_OLD: Final = {
    "0": (timedelta(0), "not at all: it is revoked at once"),
    "1h": (timedelta(hours=1), "1 hour"),
    "24h": (timedelta(hours=24), "24 hours"),
    "7d": (timedelta(days=7), "7 days"),
    "30d": (timedelta(days=30), "30 days"),
}


class RotateForm(forms.Form):
    """How long the old token still works. `name` is the token's when the form was shown."""

    name = forms.CharField(widget=forms.HiddenInput)
    keep_old = forms.ChoiceField(
        choices=[(key, words) for key, (_, words) in KEEP_OLD.items()],
        initial="24h",
        label="The old token still works for",
        widget=UnfoldAdminRadioSelectWidget,
    )


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
    token_prefix = tokens.PREFIX
    list_display = ("name", "token", "state", "opens", "created", "expires", "last_used")
    list_filter = (*TokenPage.list_filter, "limited")
    actions = ("rotate", "revoke")
    buttons = ("rotate", "revoke")
    conditional_fields: ClassVar = {"mappings": "limited == true"}

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        return super().get_queryset(request).prefetch_related("mappings")

    def get_fields(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:
        return (*super().get_fields(request, obj), "limited", "mappings")

    def get_urls(self) -> list[Any]:
        rotate: URLPattern = path(
            "<path:object_id>/rotate/",
            self.admin_site.admin_view(self.rotate_view),
            name="hooks_hooktoken_rotate",
        )
        return [rotate, *super().get_urls()]

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        super().save_model(request, obj, form, change)
        if not change:
            # In the transaction that made it: it never opens more than it is meant to.
            obj.save(update_fields=["limited"])

    def save_related(self, request: HttpRequest, form: Any, formsets: Any, change: bool) -> None:
        super().save_related(request, form, formsets, change)
        row: HookToken = form.instance
        if row.limited and not row.mappings.exists():
            self.message_user(
                request,
                f"Token {row.name} opens nothing: it is limited to mappings, and none is chosen.",
                messages.WARNING,
            )

    def example(self, request: HttpRequest, token: str) -> str:
        address = request.build_absolute_uri(HookPolicy.ensure().base_path)
        return curl.for_token(HookToken.objects.get(digest=digest(token)), token, address)

    def has_rotate_permission(self, request: HttpRequest) -> bool:
        """Whether the user may replace a token: that makes a new one and ends the old one."""
        return self.has_operate_permission(request) and self.has_add_permission(request)

    @admin.action(description="Rotate", permissions=["rotate"])
    def rotate(self, request: HttpRequest, queryset: QuerySet[Any]) -> HttpResponse | None:
        chosen = list(queryset[:2])
        if len(chosen) != 1:
            self.message_user(
                request, "Choose one token: the new one is shown once.", messages.ERROR
            )
            return None
        (row,) = chosen
        if row.revoked_at:
            self.message_user(request, f"Token {row.name} is revoked: add one.", messages.ERROR)
            return None
        return self._ask_how_long(request, row, RotateForm(initial={"name": row.name}))

    def rotate_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Ask how long the old token is to work, or, posted, replace it and show the new one."""
        row: HookToken | None = self.get_object(request, unquote(object_id))
        if row is None:
            raise Http404("no such token")
        if not self.has_rotate_permission(request):
            raise PermissionDenied
        if request.method != "POST":
            return self._ask_how_long(request, row, RotateForm(initial={"name": row.name}))
        form = RotateForm(request.POST)
        if not form.is_valid():
            return self._ask_how_long(request, row, form)
        keep_old, _ = KEEP_OLD[form.cleaned_data["keep_old"]]
        with transaction.atomic():
            old = HookToken.objects.select_for_update().get(pk=row.pk)
            # A token is renamed when it is replaced. Of two clicks the second one comes too late.
            is_current = old.name == form.cleaned_data["name"] and old.revoked_at is None
            made = (
                tokens.rotate(old.name, keep_old=keep_old, now=timezone.now())
                if is_current
                else None
            )
        if made is None:
            self.message_user(
                request,
                f"Token {form.cleaned_data['name']} was replaced or revoked already.",
                messages.ERROR,
            )
            return HttpResponseRedirect(reverse("admin:hooks_hooktoken_changelist"))
        new, token = made
        old_words = f"works for {format_duration(keep_old)} more" if keep_old else "is revoked"
        self.record(request, [new], f"Rotated: the old token {old_words}.")
        return self.show_once(
            request,
            new,
            title=f"New token {new.name}; the old one {old_words}",
            secret=token,
            example=self.example(request, token),
        )

    def _ask_how_long(
        self, request: HttpRequest, row: HookToken, form: RotateForm
    ) -> TemplateResponse:
        context = {
            **self.admin_site.each_context(request),
            "title": f"Rotate token {row.name}",
            "opts": self.opts,
            "form": form,
            "name": row.name,
            "action_url": reverse("admin:hooks_hooktoken_rotate", args=[row.pk]),
            "back_url": reverse("admin:hooks_hooktoken_change", args=[row.pk]),
            "expires_at": row.expires_at,
        }
        return TemplateResponse(request, "admin/hooks/token_rotate.html", context)

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
