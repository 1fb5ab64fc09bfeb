"""System events: read-only, but for dead letters, which are requeued or discarded."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from django.contrib import admin, messages
from django.db.models import QuerySet
from django.db.models.functions import Left
from django.http import HttpRequest
from django.utils import timezone
from django.utils.html import format_html

from wake import queue
from wake.admin.screens import (
    NOTHING,
    PREVIEW_CHARACTERS,
    ReadOnlyPage,
    SinceFilter,
    badge,
    block,
    code,
    in_portions,
    link,
    moment,
    paragraphs,
    preview,
)
from wake.admin.tables import (
    event_badge,
    heartbeat_badge,
)
from wake.models import (
    EventState,
    SystemEvent,
)
from wake.presentation import counted, exact


class EventSourceFilter(admin.SimpleListFilter):
    """By the kind of door: known names, so that no list of sources is read from the table."""

    title = "source"
    parameter_name = "door"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("cli", "command line"), ("ws", "WebSocket"), ("hook", "hooks")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(source__startswith=self.value()) if self.value() else queryset


class EventAgeFilter(SinceFilter):
    field = "created_at"


@admin.register(SystemEvent)
class SystemEventAdmin(ReadOnlyPage):
    list_display = ("line", "state_label", "age", "session_link", "source_label")
    list_filter = (
        ("state", admin.ChoicesFieldListFilter),
        ("session__agent", admin.RelatedFieldListFilter),
        EventSourceFilter,
        EventAgeFilter,
    )
    search_fields = ("text", "session__key", "source")
    search_help_text = "Text, session key, source, or a whole event id"
    ordering = ("-pk",)
    list_select_related = ("session",)
    actions = ("requeue", "discard")
    fieldsets = (
        (None, {"fields": ("now", "full_text")}),
        (
            "Facts",
            {"fields": (("session_link", "source_label"), ("event_id", "came"), "heartbeat_link")},
        ),
    )
    readonly_fields = (
        "now",
        "full_text",
        "session_link",
        "source_label",
        "event_id",
        "came",
        "heartbeat_link",
        "turn_name",
        "time_limit",
        "note",
        "answer",
    )

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        if obj is None or not obj.alone:
            return self.fieldsets
        of_turn = (("turn_name", "time_limit"), "note", "answer")
        return (*self.fieldsets, ("A turn of its own", {"fields": of_turn}))

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        # Fifty texts can be three megabytes: a list reads their beginnings only.
        events = super().get_queryset(request).defer("text")
        shortened: QuerySet[Any] = events.annotate(text_start=Left("text", PREVIEW_CHARACTERS))
        return shortened

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        try:
            event_id = UUID(search_term.strip())
        except ValueError:
            return super().get_search_results(request, queryset, search_term)
        return queryset.filter(uid=event_id), False

    def buttons_for(self, request: HttpRequest, row: SystemEvent) -> tuple[str, ...]:
        return ("requeue", "discard") if row.state == EventState.DEAD else ()

    @admin.action(description="Requeue dead letters", permissions=["operate"])
    def requeue(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        self._settle_by_hand(request, queryset, queue.requeue, "requeued")

    @admin.action(description="Discard dead letters", permissions=["operate"])
    def discard(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        self._settle_by_hand(request, queryset, queue.discard, "discarded")

    def _settle_by_hand(
        self, request: HttpRequest, queryset: QuerySet[Any], move: Any, done: str
    ) -> None:
        now = timezone.now()
        chosen = queryset.count()
        dead = list(queryset.filter(state=EventState.DEAD).order_by("pk"))
        moved = in_portions([event.pk for event in dead], lambda keys: move(keys, now=now))
        self.record(request, dead, f"{done.capitalize()}.")
        if moved:
            text = f"{counted(moved, 'dead letter')} {done}."
            self.message_user(request, text, messages.SUCCESS)
        if others := chosen - moved:
            verb = "was no dead letter and was" if others == 1 else "were no dead letters and were"
            self.message_user(
                request, f"{counted(others, 'event')} {verb} left as is.", messages.WARNING
            )

    @admin.display(description="event", ordering="pk")
    def line(self, row: Any) -> str:
        return preview(row.text_start)

    @admin.display(description="state", ordering="state")
    def state_label(self, row: SystemEvent) -> str:
        return event_badge(row)

    @admin.display(description="age", ordering="created_at")
    def age(self, row: SystemEvent) -> str:
        return moment(row.created_at)

    @admin.display(description="session")
    def session_link(self, row: SystemEvent) -> str:
        return link(row.session, code(row.session.key))

    @admin.display(description="source", ordering="source")
    def source_label(self, row: SystemEvent) -> str:
        if not row.external:
            return row.source
        external = badge("external", "warning", "From outside: set apart in the prompt as data.")
        return format_html("{} {}", row.source, external)

    @admin.display(description="event id")
    def event_id(self, row: SystemEvent) -> str:
        return code(str(row.uid))

    @admin.display(description="came")
    def came(self, row: SystemEvent) -> str:
        return format_html("{} ({})", exact(row.created_at), moment(row.created_at))

    @admin.display(description="text")
    def full_text(self, row: SystemEvent) -> str:
        return block(row.text)

    @admin.display(description="heartbeat")
    def heartbeat_link(self, row: SystemEvent) -> str:
        if row.heartbeat is None:
            return "none yet"
        run = row.heartbeat
        return format_html("{} {}", link(run, code(str(run.run_id))), heartbeat_badge(run))

    @admin.display(description="turn")
    def turn_name(self, row: SystemEvent) -> str:
        return row.turn.name

    @admin.display(description="time limit")
    def time_limit(self, row: SystemEvent) -> str:
        seconds = row.turn.timeout_seconds
        return "the agent's" if seconds is None else f"{seconds:,} s"

    @admin.display(description="note to the main session")
    def note(self, row: SystemEvent) -> str:
        turn = row.turn
        if not turn.deliver:
            return "not wanted"
        if turn.noted_at is None:
            return "waits for the end of the turn" if row.state == EventState.QUEUED else "waits"
        return format_html("done {}", moment(turn.noted_at))

    @admin.display(description="reply or error")
    def answer(self, row: SystemEvent) -> str:
        run = row.heartbeat
        return block(run.reply or run.error) if run else NOTHING

    @admin.display(description="now")
    def now(self, row: SystemEvent) -> str:
        state = EventState(row.state)
        settled = exact(row.settled_at) if row.settled_at else "an unknown time"
        said = {
            EventState.QUEUED: "Queued: it is delivered with its session's next heartbeat.",
            EventState.DELIVERED: f"Delivered at {settled}.",
            EventState.DEAD: f"Dead letter since {settled}: every attempt failed. "
            "Requeue it to try again, or discard it.",
            EventState.DISCARDED: f"Discarded by a person at {settled}; kept on record.",
        }
        return paragraphs([said[state]])
