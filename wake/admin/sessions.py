"""Sessions: what each is doing, and waking one by hand."""

from __future__ import annotations

from typing import Any

from django.contrib import admin, messages
from django.db.models import F, QuerySet
from django.http import HttpRequest
from django.utils import timezone
from django.utils.html import format_html

from wake import configuration, queue, rows
from wake.admin.screens import (
    NEWEST,
    ReadOnlyPage,
    Table,
    badge,
    code,
    in_portions,
    link_by_key,
    moment,
    paragraphs,
)
from wake.admin.tables import (
    SESSION_COLOURS,
    events_table,
    heartbeats_table,
)
from wake.models import Agent, Session
from wake.presentation import counted, exact
from wake.session_states import (
    SessionState,
    hold_reason,
    limit_reason,
    sentences,
    with_state,
)
from wake.status import with_dead


class SessionStateFilter(admin.SimpleListFilter):
    title = "state"
    parameter_name = "state"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return list(SessionState.choices)

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(state=self.value()) if self.value() else queryset


@admin.register(Session)
class SessionAdmin(ReadOnlyPage):
    list_display = (
        "session_key",
        "agent_name",
        "state",
        "queued",
        "dead",
        "due",
        "last_event",
        "last_heartbeat",
    )
    list_filter = (SessionStateFilter, "agent")
    search_fields = ("key",)
    search_help_text = "Part of a session key"
    ordering = (F("last_event_at").desc(nulls_last=True), "-pk")
    actions = ("wake",)
    buttons = ("wake",)
    fieldsets = (
        (None, {"fields": ("now", "session_key", "agent_link")}),
        (
            "Facts",
            {"fields": (("state", "due"), ("last_event", "last_heartbeat"), ("lease", "created"))},
        ),
    )
    readonly_fields = (
        "now",
        "session_key",
        "agent_link",
        "state",
        "due",
        "last_event",
        "last_heartbeat",
        "lease",
        "created",
    )

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        return with_dead(
            with_state(super().get_queryset(request), configuration.gateway(), timezone.now())
        )

    def tables_for(self, row: Session) -> list[Table]:
        return [
            events_table(
                "Newest events",
                row.events.filter(pk__in=rows.newest_events(row.pk, NEWEST)).order_by("-pk"),
            ),
            heartbeats_table("Newest heartbeats", row.heartbeats.all()),
        ]

    @admin.action(description="Wake now", permissions=["operate"])
    def wake(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        sessions = list(queryset.order_by())
        now = timezone.now()
        woken = in_portions(
            [session.pk for session in sessions],
            lambda keys: queue.wake_sessions(keys, now=now),
        )
        self.record(request, sessions, "Woken.")
        already = len(sessions) - woken
        text = f"{counted(woken, 'session')} woken."
        if already:
            text += f" {already:,} {'was' if already == 1 else 'were'} due already."
        self.message_user(request, text, messages.SUCCESS)
        snapshot = configuration.gateway()
        held = {hold_reason(session.agent_id, snapshot) for session in sessions} - {None}
        for reason in sorted(str(reason) for reason in held):
            self.message_user(request, f"Held: {reason}; events wait.", messages.WARNING)

    @admin.display(description="session", ordering="key")
    def session_key(self, row: Session) -> str:
        return code(row.key)

    @admin.display(description="agent", ordering="agent")
    def agent_name(self, row: Session) -> str:
        return row.agent_id

    @admin.display(description="agent")
    def agent_link(self, row: Session) -> str:
        return link_by_key(Agent, row.agent_id, row.agent_id)

    @admin.display(description="state", ordering="state")
    def state(self, row: Any) -> str:
        state = SessionState(row.state)
        label = badge(state.value.replace("-", " "), SESSION_COLOURS[state], str(state.label))
        more = ""
        if state == SessionState.HELD:
            more = limit_reason(row, configuration.gateway())
        elif state == SessionState.BACKING_OFF:
            more = f"until {row.due_at:%H:%M:%S}, attempt {row.attempts}"
        elif state == SessionState.WAITING:
            more = str(hold_reason(row.agent_id, configuration.gateway()))
        if not more:
            return label
        return format_html('{}<span class="wake-beside">{}</span>', label, more)

    @admin.display(description="dead")
    def dead(self, row: Any) -> str:
        return badge(f"{row.dead_count:,}", "danger") if row.dead_count else "0"

    @admin.display(description="due", ordering="due_at")
    def due(self, row: Session) -> str:
        return moment(row.due_at)

    @admin.display(description="last event", ordering="last_event_at")
    def last_event(self, row: Session) -> str:
        return moment(row.last_event_at)

    @admin.display(description="last heartbeat", ordering="last_heartbeat_at")
    def last_heartbeat(self, row: Session) -> str:
        return moment(row.last_heartbeat_at)

    @admin.display(description="first seen")
    def created(self, row: Session) -> str:
        return moment(row.created_at)

    @admin.display(description="lease")
    def lease(self, row: Session) -> str:
        if row.lease_token is None or row.lease_until is None:
            return "none"
        return format_html("held by {} until {}", row.lease_owner, exact(row.lease_until))

    @admin.display(description="now")
    def now(self, row: Any) -> str:
        return paragraphs(
            sentences(
                row,
                SessionState(row.state),
                dead=row.dead_count,
                snapshot=configuration.gateway(),
                now=timezone.now(),
            )
        )
