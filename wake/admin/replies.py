"""Reply posts: read-only, but for those that failed, which can be sent again."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from django.contrib import admin, messages
from django.db.models import QuerySet
from django.db.models.functions import Left
from django.http import HttpRequest
from django.utils import timezone

from wake.admin.screens import (
    PREVIEW_CHARACTERS,
    ReadOnlyPage,
    SinceFilter,
    block,
    code,
    in_portions,
    link,
    moment,
    paragraphs,
    preview,
)
from wake.admin.tables import reply_badge
from wake.heartbeats import replies
from wake.models import ReplyPost, ReplyState
from wake.presentation import counted, exact
from wake.redaction import without_credentials


class ReplyAgeFilter(SinceFilter):
    field = "created_at"


@admin.register(ReplyPost)
class ReplyPostAdmin(ReadOnlyPage):
    list_display = (
        "queued",
        "state_label",
        "agent",
        "session_link",
        "attempts",
        "next_attempt",
        "last_error",
    )
    list_filter = (
        ("state", admin.ChoicesFieldListFilter),
        ("heartbeat__session__agent", admin.RelatedFieldListFilter),
        ReplyAgeFilter,
    )
    search_fields = ("heartbeat__session__key",)
    search_help_text = "Part of a session key, or a whole run id"
    ordering = ("-created_at", "-pk")
    list_select_related = ("heartbeat__session",)
    actions = ("send_again",)
    fieldsets = (
        (None, {"fields": ("now", "full_error", "full_reply")}),
        (
            "Facts",
            {
                "fields": (
                    ("session_link", "run"),
                    ("attempts", "next_attempt"),
                    ("queued", "address"),
                )
            },
        ),
    )
    readonly_fields = (
        "now",
        "full_error",
        "full_reply",
        "session_link",
        "run",
        "attempts",
        "next_attempt",
        "queued",
        "address",
    )

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        posts = super().get_queryset(request)
        # A list reads no replies, and of errors their beginnings only.
        posts = posts.defer("error", "heartbeat__prompt", "heartbeat__reply", "heartbeat__error")
        shortened: QuerySet[Any] = posts.annotate(failed=Left("error", PREVIEW_CHARACTERS))
        return shortened

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        try:
            run_id = UUID(search_term.strip())
        except ValueError:
            return super().get_search_results(request, queryset, search_term)
        return queryset.filter(heartbeat__run_id=run_id), False

    def buttons_for(self, request: HttpRequest, row: ReplyPost) -> tuple[str, ...]:
        return ("send_again",) if row.state == ReplyState.FAILED else ()

    @admin.action(description="Send again", permissions=["operate"])
    def send_again(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        now = timezone.now()
        chosen = queryset.count()
        failed = list(queryset.filter(state=ReplyState.FAILED).order_by("pk"))
        count = in_portions(
            [post.pk for post in failed], lambda keys: replies.send_again(keys, now=now)
        )
        self.record(request, failed, "Sent again.")
        if count:
            text = f"{counted(count, 'reply', 'replies')} will be sent again."
            self.message_user(request, text, messages.SUCCESS)
        if others := chosen - count:
            verb = "had not failed and was" if others == 1 else "had not failed and were"
            text = f"{counted(others, 'reply', 'replies')} {verb} left as is."
            self.message_user(request, text, messages.WARNING)

    @admin.display(description="queued", ordering="created_at")
    def queued(self, row: ReplyPost) -> str:
        return moment(row.created_at)

    @admin.display(description="state", ordering="state")
    def state_label(self, row: ReplyPost) -> str:
        return reply_badge(row)

    @admin.display(description="agent", ordering="heartbeat__session__agent")
    def agent(self, row: ReplyPost) -> str:
        return row.heartbeat.session.agent_id

    @admin.display(description="session")
    def session_link(self, row: ReplyPost) -> str:
        return link(row.heartbeat.session, code(row.heartbeat.session.key))

    @admin.display(description="run")
    def run(self, row: ReplyPost) -> str:
        return link(row.heartbeat, code(str(row.heartbeat.run_id)))

    @admin.display(description="next attempt", ordering="due_at")
    def next_attempt(self, row: ReplyPost) -> str:
        return moment(row.due_at)

    @admin.display(description="error")
    def last_error(self, row: Any) -> str:
        return preview(row.failed)

    @admin.display(description="reply URL now")
    def address(self, row: ReplyPost) -> str:
        url = row.heartbeat.session.agent.reply_url
        return without_credentials(url) if url else "none"

    @admin.display(description="last error")
    def full_error(self, row: ReplyPost) -> str:
        return block(row.error)

    @admin.display(description="reply")
    def full_reply(self, row: ReplyPost) -> str:
        return block(row.heartbeat.reply)

    @admin.display(description="now")
    def now(self, row: ReplyPost) -> str:
        state = ReplyState(row.state)
        settled = exact(row.settled_at) if row.settled_at else "an unknown time"
        due = exact(row.due_at) if row.due_at else "an unknown time"
        after = f"after {counted(row.attempts, 'attempt')}"
        said = {
            ReplyState.PENDING: f"On its way {after}: the next one is due at {due}.",
            ReplyState.SENT: f"Taken at {settled} {after}.",
            ReplyState.FAILED: f"Given up at {settled} {after}. Put it right and send it again.",
        }
        return paragraphs([said[state]])
