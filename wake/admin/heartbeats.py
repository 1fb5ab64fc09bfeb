"""Heartbeats: what was handed over, and what came of it."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from django.contrib import admin
from django.db.models import Q, QuerySet
from django.db.models.functions import Left
from django.http import HttpRequest
from django.utils.html import format_html

from wake.admin.screens import (
    NOTHING,
    PREVIEW_CHARACTERS,
    ReadOnlyPage,
    SinceFilter,
    Table,
    block,
    code,
    link,
    moment,
    preview,
)
from wake.admin.tables import (
    events_table,
    heartbeat_badge,
    heartbeat_duration,
    reply_badge,
)
from wake.models import (
    Heartbeat,
    ReplyPost,
    SystemEvent,
)
from wake.presentation import exact


class HeartbeatAgeFilter(SinceFilter):
    field = "started_at"


@admin.register(Heartbeat)
class HeartbeatAdmin(ReadOnlyPage):
    list_display = (
        "started",
        "status_label",
        "session_link",
        "reason",
        "attempt",
        "event_count",
        "took",
        "outcome",
    )
    list_filter = (
        ("status", admin.ChoicesFieldListFilter),
        ("session__agent", admin.RelatedFieldListFilter),
        ("reason", admin.ChoicesFieldListFilter),
        HeartbeatAgeFilter,
    )
    search_fields = ("session__key",)
    search_help_text = "Part of a session key, a whole run id, or the id of an event it settled"
    ordering = ("-started_at", "-pk")
    fieldsets = (
        (
            None,
            {"fields": ("status_label", "full_error", "full_reply", "posted", "full_prompt")},
        ),
        (
            "Facts",
            {
                "fields": (
                    ("session_link", "run"),
                    ("reason", "attempt"),
                    ("started_exactly", "took"),
                    "event_count",
                )
            },
        ),
    )
    readonly_fields = (
        "status_label",
        "full_error",
        "full_reply",
        "posted",
        "full_prompt",
        "session_link",
        "run",
        "reason",
        "attempt",
        "started_exactly",
        "took",
        "event_count",
    )

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        runs = super().get_queryset(request).select_related("session", "reply_post")
        runs = runs.defer("prompt", "reply", "error", "reply_post__error")
        shortened: QuerySet[Any] = runs.annotate(
            said=Left("reply", PREVIEW_CHARACTERS), failed=Left("error", PREVIEW_CHARACTERS)
        )
        return shortened

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        try:
            run_id = UUID(search_term.strip())
        except ValueError:
            return super().get_search_results(request, queryset, search_term)
        # A turn of its own is known by its first run, which another one may have followed.
        settled = SystemEvent.objects.filter(uid=run_id).values_list("heartbeat_id", flat=True)
        return queryset.filter(Q(run_id=run_id) | Q(pk__in=list(settled))), False

    def tables_for(self, row: Heartbeat) -> list[Table]:
        return [events_table("Events it settled", row.events.order_by("pk"))]

    @admin.display(description="started", ordering="started_at")
    def started(self, row: Heartbeat) -> str:
        return moment(row.started_at)

    @admin.display(description="started")
    def started_exactly(self, row: Heartbeat) -> str:
        return format_html("{} ({})", exact(row.started_at), moment(row.started_at))

    @admin.display(description="status", ordering="status")
    def status_label(self, row: Heartbeat) -> str:
        return heartbeat_badge(row)

    @admin.display(description="session")
    def session_link(self, row: Heartbeat) -> str:
        return link(row.session, code(row.session.key))

    @admin.display(description="run id")
    def run(self, row: Heartbeat) -> str:
        return code(str(row.run_id))

    @admin.display(description="took")
    def took(self, row: Heartbeat) -> str:
        return heartbeat_duration(row)

    @admin.display(description="reply or error")
    def outcome(self, row: Any) -> str:
        return preview(row.failed or row.said)

    @admin.display(description="error")
    def full_error(self, row: Heartbeat) -> str:
        return block(row.error)

    @admin.display(description="reply")
    def full_reply(self, row: Heartbeat) -> str:
        return block(row.reply)

    @admin.display(description="reply post")
    def posted(self, row: Heartbeat) -> str:
        post: ReplyPost | None = getattr(row, "reply_post", None)
        return link(post, reply_badge(post)) if post else NOTHING

    @admin.display(description="prompt")
    def full_prompt(self, row: Heartbeat) -> str:
        return block(row.prompt)
