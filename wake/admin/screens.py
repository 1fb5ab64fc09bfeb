"""The parts that the admin's pages are made of: read-only pages, one-row pages, tokens, labels.

Everything that ends in HTML goes through `format_html` or a template: event texts, replies and
session keys come from outside and are hostile until escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, ClassVar, Final, Literal

from django import forms
from django.contrib import admin, messages
from django.contrib.admin import helpers
from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.admin.utils import quote, unquote
from django.core.exceptions import PermissionDenied, ValidationError
from django.db import transaction
from django.db.models import Model, QuerySet
from django.http import (
    Http404,
    HttpRequest,
    HttpResponse,
    HttpResponseBadRequest,
    HttpResponseRedirect,
)
from django.template.loader import render_to_string
from django.template.response import TemplateResponse
from django.templatetags.static import static
from django.urls import URLPattern, path, reverse
from django.utils import timezone
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

from wake import tokens
from wake.admin.unfold_bases import ModelAdmin, UnfoldAdminRadioSelectWidget
from wake.durations import format_duration
from wake.models import HashedToken
from wake.presentation import counted, exact, first_line, relative

Colour = Literal["info", "danger", "warning", "success", "primary", "plain"]

# So many rows of a session's events or heartbeats stand on its page.
NEWEST: Final = 20
NOTHING: Final = "\N{EN DASH}"
PREVIEW_CHARACTERS: Final = 200


# --- Pieces of HTML -----------------------------------------------------------------------------


# Where a browser may break a line; it leaves no trace when the text is copied.
_BREAK: Final = SafeString("<wbr>")


def badge(text: str, colour: Colour = "plain", title: str = "") -> SafeString:
    """Return a coloured label."""
    return render_to_string(
        "unfold/helpers/label.html", {"text": text, "type": colour, "label_title": title}
    )


def moment(at: datetime | None, now: datetime | None = None) -> str:
    """Return `3 min ago` with the exact time as its title; a dash for None."""
    if at is None:
        return NOTHING
    return format_html(
        '<time class="wake-nowrap" datetime="{}" title="{}">{}</time>',
        at.isoformat(),
        exact(at),
        relative(at, now or timezone.now()),
    )


def code(text: str) -> SafeString:
    """Return a name as machines use it (a session key, an id), to be broken after its colons."""
    segments = ((segment,) for segment in text.split(":"))
    breakable = format_html_join(format_html(":{}", _BREAK), "{}", segments)
    return format_html('<span class="wake-code">{}</span>', breakable)


def block(text: str) -> str:
    """Return a text as it is, line by line; a dash for an empty one."""
    return format_html('<pre class="wake-block">{}</pre>', text) if text else NOTHING


def paragraphs(sentences: Iterable[str]) -> SafeString:
    """Return sentences, one to a line; the first one stands out."""
    return render_to_string("admin/wake/sentences.html", {"sentences": list(sentences)})


def link(row: Model, text: str) -> SafeString:
    """Return a link to a row's page in the admin."""
    return link_by_key(type(row), row.pk, text)


def link_by_key(model: type[Model], key: object, text: str) -> SafeString:
    """Return a link to the page of the row with that primary key, without reading it."""
    meta = model._meta
    url = reverse(f"admin:{meta.app_label}_{meta.model_name}_change", args=[quote(str(key))])
    return format_html('<a class="text-link" href="{}">{}</a>', url, text)


def list_url(model: type[Model], query: str = "") -> str:
    """Return the address of a model's list, with `query` (already encoded) after its `?`."""
    url = reverse(f"admin:{model._meta.app_label}_{model._meta.model_name}_changelist")
    return f"{url}?{query}" if query else url


def preview(text: str) -> str:
    """Return the first line of a text for a list; a dash when there is none."""
    line = first_line(text)
    return format_html('<span class="wake-preview">{}</span>', line) if line else NOTHING


@dataclass(frozen=True, slots=True)
class Table:
    """A titled table under a page's facts. Cells are escaped unless they are safe strings."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def table(self) -> dict[str, Any]:
        """The shape that Unfold's table component reads."""
        return {"headers": self.headers, "rows": self.rows}


class SinceFilter(admin.SimpleListFilter):
    """Rows not older than an hour, a day, a week. `field` is the column of time."""

    title = "age"
    parameter_name = "since"
    field: ClassVar[str]
    periods: ClassVar[dict[str, tuple[str, timedelta]]] = {
        "hour": ("past hour", timedelta(hours=1)),
        "day": ("past day", timedelta(days=1)),
        "week": ("past week", timedelta(days=7)),
    }

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(key, words) for key, (words, _) in self.periods.items()]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        if self.value() not in self.periods:
            return queryset
        _, period = self.periods[str(self.value())]
        return queryset.filter(**{f"{self.field}__gte": timezone.now() - period})


def stylesheet(request: HttpRequest) -> str:
    """Return the address of what Unfold has no class for. Named in the setting UNFOLD."""
    return static("wake/admin.css")


# --- Pages --------------------------------------------------------------------------------------


class Page(ModelAdmin):
    """What all pages share: no surprise queries on large tables, and buttons on a row's own page.

    `buttons` names actions of the list that also stand, as buttons, on the page of one row.
    """

    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    list_per_page = 50
    compressed_fields = True
    buttons: ClassVar[tuple[str, ...]] = ()
    change_form_outer_before_template = "admin/wake/buttons.html"
    change_form_outer_after_template = "admin/wake/tables.html"

    def has_operate_permission(self, request: HttpRequest) -> bool:
        """Whether the user may run this model's actions: those who hold its change permission."""
        meta = self.opts
        return bool(request.user.has_perm(f"{meta.app_label}.change_{meta.model_name}"))

    def buttons_for(self, request: HttpRequest, row: Any) -> tuple[str, ...]:
        """Return the actions that make sense for this row."""
        return self.buttons

    def tables_for(self, row: Any) -> list[Table]:
        """Return the tables under this row's facts."""
        return []

    def render_change_form(
        self,
        request: HttpRequest,
        context: dict[str, Any],
        add: bool = False,
        change: bool = False,
        form_url: str = "",
        obj: Any = None,
    ) -> HttpResponse:
        if obj is not None:
            actions = self.get_actions(request)
            context["buttons"] = [
                {"action": name, "text": action[2]}
                for name in self.buttons_for(request, obj)
                if (action := actions.get(name))
            ]
            context["tables"] = self.tables_for(obj)
        return super().render_change_form(request, context, add, change, form_url, obj)

    def response_action(
        self, request: HttpRequest, queryset: QuerySet[Any], *args: Any, **kwargs: Any
    ) -> HttpResponse | None:
        """Run an action; one that was started by a button leads back to its row's page."""
        try:
            for key in request.POST.getlist(helpers.ACTION_CHECKBOX_NAME):
                self.opts.pk.clean(key, None)
        except ValidationError:  # no form of ours sends it
            return HttpResponseBadRequest("no such row\n", "text/plain")
        response = super().response_action(request, queryset, *args, **kwargs)
        if "stay" in request.POST and isinstance(response, HttpResponseRedirect):
            (row,) = request.POST.getlist(helpers.ACTION_CHECKBOX_NAME)[:1] or [""]
            meta = self.opts
            return HttpResponseRedirect(
                reverse(f"admin:{meta.app_label}_{meta.model_name}_change", args=[quote(row)])
            )
        return response

    def record(self, request: HttpRequest, rows: Iterable[Any], what: str) -> None:
        """Write into the admin's history that this user did `what` with the rows."""
        if request.user.pk is not None:
            LogEntry.objects.log_actions(request.user.pk, list(rows), CHANGE, change_message=what)

    def show_once(
        self, request: HttpRequest, row: Model, *, title: str, secret: str, example: str = ""
    ) -> TemplateResponse:
        """Show a secret on a page of its own.

        It is neither a message nor a redirect: both would store the secret on their way.
        """
        context = {
            **self.admin_site.each_context(request),
            "title": title,
            "opts": self.opts,
            "secret": secret,
            "example": example,
            "row": row,
            "next_url": list_url(type(row)),
        }
        return TemplateResponse(request, "admin/wake/shown_once.html", context)


class ReadOnlyPage(Page):
    """Rows that are looked at and acted on, but never written by a form."""

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


class OneRowPage(Page):
    """Settings of which there is exactly one row: the list leads straight to its form."""

    def ensure_row(self) -> Model:
        """Return the one row, made where it is missing."""
        raise NotImplementedError

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        meta = self.opts
        return HttpResponseRedirect(
            reverse(
                f"admin:{meta.app_label}_{meta.model_name}_change",
                args=[quote(self.ensure_row().pk)],
            )
        )

    def change_view(
        self,
        request: HttpRequest,
        object_id: str,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> HttpResponse:
        hidden = {"show_save_and_continue": False}
        return super().change_view(
            request, object_id, form_url, {**hidden, **(extra_context or {})}
        )


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


class TokenPage(Page):
    """Bearer tokens: made here, shown once, and known by their hash ever after."""

    list_display: tuple[str, ...] = ("name", "token", "state", "created", "expires", "last_used")
    list_filter: ClassVar[tuple[Any, ...]] = (("revoked_at", admin.EmptyFieldListFilter),)
    search_fields = ("name", "hint")
    actions: tuple[str, ...] = ("rotate", "revoke")
    buttons: ClassVar[tuple[str, ...]] = ("rotate", "revoke")
    fields = ("name", "expires_at")

    def make(self, entered: Any) -> tuple[HashedToken, str]:
        """Store the token of which a form's row was entered."""
        raise NotImplementedError

    def replace(self, name: str, *, keep_old: timedelta, now: datetime) -> tuple[HashedToken, str]:
        """Rotate a token; see `wake.tokens.rotate`."""
        raise NotImplementedError

    def example(self, request: HttpRequest, row: Any, token: str) -> str:
        """Return a command line that uses the token; an empty one when there is none."""
        raise NotImplementedError

    def get_fields(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:
        if obj is None:
            return ("name", "expires_at")
        return ("state", "name", "token", "created", "expires_at", "last_used")

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:
        return ("state", "token", "created", "last_used")

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        if change:
            super().save_model(request, obj, form, change)
            return
        made, token = self.make(obj)
        # What the admin goes on with becomes the stored row.
        obj.pk, obj._state, obj.new_token = made.pk, made._state, token

    def response_add(
        self, request: HttpRequest, obj: Any, post_url_continue: str | None = None
    ) -> HttpResponse:
        return self.show_once(
            request,
            obj,
            title=f"{self.opts.verbose_name} {obj.name}".capitalize(),
            secret=obj.new_token,
            example=self.example(request, obj, obj.new_token),
        )

    def buttons_for(self, request: HttpRequest, row: HashedToken) -> tuple[str, ...]:
        return () if row.revoked_at else self.buttons

    def get_urls(self) -> list[Any]:
        rotate: URLPattern = path(
            "<path:object_id>/rotate/",
            self.admin_site.admin_view(self.rotate_view),
            name=self._rotate_url_name,
        )
        return [rotate, *super().get_urls()]

    @property
    def _rotate_url_name(self) -> str:
        return f"{self.opts.app_label}_{self.opts.model_name}_rotate"

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
        row: HashedToken | None = self.get_object(request, unquote(object_id))
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
        name = form.cleaned_data["name"]
        try:
            with transaction.atomic():
                old = self.model._default_manager.select_for_update().get(pk=row.pk)
                # Renamed when it was replaced: of two clicks the second one comes too late.
                if old.name != name or old.revoked_at is not None:
                    raise ValidationError(f"Token {name} was replaced or revoked already.")
                new, token = self.replace(name, keep_old=keep_old, now=timezone.now())
        except ValidationError as error:
            self.message_user(request, " ".join(error.messages), messages.ERROR)
            return HttpResponseRedirect(list_url(self.model))
        old_words = f"works for {format_duration(keep_old)} more" if keep_old else "is revoked"
        self.record(request, [new], f"Rotated: the old token {old_words}.")
        return self.show_once(
            request,
            new,
            title=f"New token {new.name}; the old one {old_words}",
            secret=token,
            example=self.example(request, new, token),
        )

    def _ask_how_long(
        self, request: HttpRequest, row: HashedToken, form: RotateForm
    ) -> TemplateResponse:
        meta = self.opts
        context = {
            **self.admin_site.each_context(request),
            "title": f"Rotate token {row.name}",
            "opts": self.opts,
            "form": form,
            "name": row.name,
            "action_url": reverse(f"admin:{self._rotate_url_name}", args=[row.pk]),
            "back_url": reverse(f"admin:{meta.app_label}_{meta.model_name}_change", args=[row.pk]),
            "expires_at": row.expires_at,
        }
        return TemplateResponse(request, "admin/wake/token_rotate.html", context)

    @admin.action(description="Revoke", permissions=["operate"])
    def revoke(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        revoked = tokens.revoke(queryset, timezone.now())
        self.record(request, revoked, "Revoked.")
        self.message_user(request, f"{counted(len(revoked), 'token')} revoked.", messages.SUCCESS)

    @admin.display(description="state")
    def state(self, row: HashedToken) -> str:
        now = timezone.now()
        if row.revoked_at:
            return badge("revoked", "danger", f"at {exact(row.revoked_at)}")
        if not tokens.is_usable(row, now):
            return badge("expired", "warning")
        return badge("valid", "success")

    @admin.display(description="token", ordering="hint")
    def token(self, row: HashedToken) -> str:
        return code(f"{row.hint}…")

    @admin.display(description="created", ordering="created_at")
    def created(self, row: HashedToken) -> str:
        return moment(row.created_at)

    @admin.display(description="expires", ordering="expires_at")
    def expires(self, row: HashedToken) -> str:
        return moment(row.expires_at) if row.expires_at else "never"

    @admin.display(description="last used", ordering="last_used_at")
    def last_used(self, row: HashedToken) -> str:
        return moment(row.last_used_at) if row.last_used_at else "never"


def in_portions(keys: Sequence[int], act: Callable[[Sequence[int]], int]) -> int:
    """Call `act` on a thousand keys at a time, and return the sum of what it returned.

    A database takes only so many parameters in one statement.
    """
    return sum(act(keys[start : start + 1000]) for start in range(0, len(keys), 1000))
