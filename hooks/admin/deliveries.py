"""What came in: deliveries, to be looked into and replayed, and who showed wrong credentials."""

from __future__ import annotations

import json
import re
from collections import Counter
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import urlencode
from uuid import UUID

import msgspec
from django.contrib import admin, messages
from django.db.models import Q, QuerySet, TextField
from django.db.models.functions import Cast
from django.http import HttpRequest
from django.utils import timezone
from django.utils.html import format_html

from hooks import configuration, throttling
from hooks.admin import simulator
from hooks.deliveries import NotReplayable, arrival_again, replay
from hooks.errors import NotAuthorized
from hooks.models import DeliveryOutcome, FailedCredentials, HookDelivery, HookMapping
from hooks.simulation import Trial, simulate
from wake import configuration as wake_configuration
from wake.admin.screens import (
    NEWEST,
    NOTHING,
    Colour,
    ReadOnlyPage,
    SinceFilter,
    Table,
    badge,
    block,
    code,
    link,
    link_by_key,
    list_url,
    moment,
    paragraphs,
    preview,
)
from wake.admin.tables import events_table
from wake.errors import StorageUnavailable
from wake.models import SystemEvent
from wake.presentation import counted, exact, first_line, run_time

OUTCOME_COLOURS: Final[dict[DeliveryOutcome, Colour]] = {
    DeliveryOutcome.QUEUED: "success",
    DeliveryOutcome.COALESCED: "info",
    DeliveryOutcome.REPLAYED: "info",
    DeliveryOutcome.IGNORED: "plain",
    DeliveryOutcome.ANSWERED: "plain",
    DeliveryOutcome.REFUSED: "warning",
    DeliveryOutcome.FAILED: "danger",
}
_WENT_WRONG: Final = frozenset({DeliveryOutcome.REFUSED, DeliveryOutcome.FAILED})

# What a list never reads: fifty bodies can be hundreds of megabytes.
_LARGE: Final = ("body", "headers", "query", "answer")

SHOWN_CHARACTERS: Final = 20_000
# Larger bodies are shown as they came; setting out megabytes anew takes its time.
MAX_SET_OUT_BYTES: Final = 1024 * 1024
# Each replay is a transaction of its own, and a person waits for all of them.
MAX_REPLAYS: Final = 500
TOP_CLIENTS: Final = 10
_CLIENTS_LOOKED_AT: Final = 2_000
_REASONS_TOLD: Final = 3

# An event's id begins with the milliseconds since the epoch (UUID, version 7). Its delivery came a
# moment before; those that were coalesced with it, or got its answer again, came within a day.
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_BEFORE_EVENT: Final = timedelta(minutes=1)
_AFTER_EVENT: Final = timedelta(days=1)

# Characters that a browser drops, or that turn the order of others around. Not line ends and tabs.
_UNSEEN = re.compile("[\0-\b\v-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Return a text from outside with every control character written out. Pure."""
    unified = text.replace("\r\n", "\n")
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), unified)


def body_in_words(body: bytes) -> tuple[str, str]:
    """Return a body as text to look at, at most so much of it, and a sentence about it. Pure.

    JSON is set out anew, its values as they were written; bytes that are no UTF-8 are written out.
    """
    shown, kind = body, ""
    if len(body) <= MAX_SET_OUT_BYTES:
        try:
            shown, kind = msgspec.json.format(body, indent=2), " of JSON, set out anew"
        except (msgspec.DecodeError, RecursionError):
            kind = ", no JSON"
    # Of what is cut off, no character needs to be decoded; four bytes are the longest one.
    text = visible(shown[: 4 * SHOWN_CHARACTERS].decode("utf-8", "backslashreplace"))
    size = f"{counted(len(body), 'byte')}{kind}."
    if len(text) <= SHOWN_CHARACTERS and len(shown) <= 4 * SHOWN_CHARACTERS:
        return text, size
    return text[:SHOWN_CHARACTERS], f"{size} Only the beginning is shown."


def event_ids(answer: Any) -> list[str]:
    """Return the ids of the events that a stored answer names, in its order. Pure."""
    if not isinstance(answer, dict):
        return []
    receipts = answer.get("results", [answer])
    found = (receipt.get("eventId") or receipt.get("runId") for receipt in receipts)
    return [one for one in found if one]


def delivery_badge(delivery: HookDelivery) -> str:
    """Return a delivery's outcome as a coloured label."""
    outcome = DeliveryOutcome(delivery.outcome)
    return badge(outcome.value, OUTCOME_COLOURS[outcome], str(outcome.label))


class ClientFilter(admin.SimpleListFilter):
    """By the sender's address: those that sent most of late, and any other by the address bar."""

    title = "client"
    parameter_name = "client"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        newest = HookDelivery.objects.order_by("-pk").values_list("client", flat=True)
        top = Counter(newest[:_CLIENTS_LOOKED_AT]).most_common(TOP_CLIENTS)
        chosen = [self.value()] if self.value() else []
        clients = dict.fromkeys([*(client for client, _ in top), *map(str, chosen)])
        return [(client, client) for client in clients]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(client=self.value()) if self.value() else queryset


class DeliveryAgeFilter(SinceFilter):
    field = "received_at"


@admin.register(HookDelivery)
class HookDeliveryAdmin(ReadOnlyPage):
    list_display = (
        "came",
        "outcome_label",
        "status",
        "address",
        "mapping_link",
        "client",
        "credential",
        "took",
    )
    list_filter = (
        ("outcome", admin.ChoicesFieldListFilter),
        ("mapping", admin.RelatedFieldListFilter),
        ClientFilter,
        DeliveryAgeFilter,
    )
    search_fields = ("path", "client", "idempotency_key")
    search_help_text = "Path, client or idempotency key, or a whole delivery id or event id"
    ordering = ("-pk",)
    actions = ("replay",)
    change_form_outer_before_template = "admin/hooks/delivery_buttons.html"
    fieldsets = (
        (None, {"fields": ("now", "full_answer")}),
        (
            "Facts",
            {
                "fields": (
                    ("delivery_id", "received"),
                    ("address", "mapping_link"),
                    ("client_link", "credential"),
                    ("took", "key"),
                    "original",
                )
            },
        ),
        (
            "What was sent",
            {
                "fields": ("full_headers", "full_query", "full_body"),
                "description": "It may hold private data. Credentials are never kept. What is kept "
                "at all is set in the hook policy.",
            },
        ),
        ("Through today's configuration", {"fields": ("today",)}),
    )
    readonly_fields = (
        "now",
        "full_answer",
        "delivery_id",
        "received",
        "address",
        "mapping_link",
        "client_link",
        "credential",
        "took",
        "key",
        "original",
        "full_headers",
        "full_query",
        "full_body",
        "today",
    )

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        return super().get_queryset(request).defer(*_LARGE)

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        try:
            uid = UUID(search_term.strip())
        except ValueError:
            return super().get_search_results(request, queryset, search_term)
        return queryset.filter(Q(uid=uid) | Q(pk__in=_of_event(uid))), False

    def render_change_form(
        self, request: HttpRequest, context: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        row = kwargs.get("obj")
        if row is not None and row.has_body and simulator.may_simulate(request):
            context["simulator_url"] = simulator.url(delivery=str(row.uid))
        return super().render_change_form(request, context, *args, **kwargs)

    def buttons_for(self, request: HttpRequest, row: HookDelivery) -> tuple[str, ...]:
        return ("replay",) if row.has_body else ()

    def tables_for(self, row: HookDelivery) -> list[Table]:
        events = SystemEvent.objects.filter(uid__in=event_ids(row.answer)).order_by("pk")
        made = row.replays.defer(*_LARGE).order_by("-pk")
        tables = [events_table("Events", events)] if events.exists() else []
        if made.exists():
            rows = [
                (
                    link(one, code(str(one.uid))),
                    moment(one.received_at),
                    delivery_badge(one),
                    preview(one.error),
                )
                for one in made[:NEWEST]
            ]
            tables.append(Table("Replayed as", ("delivery", "when", "outcome", "error"), rows))
        return tables

    @admin.action(description="Replay", permissions=["operate"])
    def replay(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        # The keys first: what a replay stores must not be among what is still to be replayed.
        chosen = queryset.order_by("received_at", "pk").values_list("pk", "has_body")
        keys = list(chosen[: MAX_REPLAYS + 1])
        if len(keys) > MAX_REPLAYS:
            self.message_user(
                request,
                f"At most {MAX_REPLAYS} are replayed at once: choose fewer.",
                messages.ERROR,
            )
            return
        came_to: dict[int, str] = {}
        for key, has_body in keys:
            delivery = HookDelivery.objects.filter(pk=key).first() if has_body else None
            if delivery is not None:
                came_to[key] = _replayed(delivery)
        replayed = HookDelivery.objects.filter(pk__in=came_to).only("uid")
        self.record(request, replayed, "Replayed.")
        self._say(request, Counter(came_to.values()), skipped=len(keys) - len(came_to))

    def _say(self, request: HttpRequest, came_to: Counter[str], *, skipped: int) -> None:
        """Tell how often what came of it: `2 queued, 1 refused: reason.`"""
        most = came_to.most_common(_REASONS_TOLD)
        told = [f"{count:,} {words}" for words, count in most]
        if others := came_to.total() - sum(count for _, count in most):
            told.append(f"{others:,} more: see the list")
        if told:
            went_wrong = any(words.partition(":")[0] in _WENT_WRONG for words in came_to)
            level = messages.WARNING if went_wrong else messages.SUCCESS
            self.message_user(request, f"Replayed: {', '.join(told)}.", level)
        if skipped:
            were = "delivery was" if skipped == 1 else "deliveries were"
            text = f"{skipped:,} {were} skipped: without a body there is nothing to replay."
            self.message_user(request, text, messages.WARNING)

    @admin.display(description="came", ordering="received_at")
    def came(self, row: HookDelivery) -> str:
        return moment(row.received_at)

    @admin.display(description="received")
    def received(self, row: HookDelivery) -> str:
        return format_html("{} ({})", exact(row.received_at), moment(row.received_at))

    @admin.display(description="outcome", ordering="outcome")
    def outcome_label(self, row: HookDelivery) -> str:
        return delivery_badge(row)

    @admin.display(description="path", ordering="path")
    def address(self, row: HookDelivery) -> str:
        return code(visible(row.path))

    @admin.display(description="mapping", ordering="mapping_name")
    def mapping_link(self, row: HookDelivery) -> str:
        if row.mapping_id is not None:
            return link_by_key(HookMapping, row.mapping_id, row.mapping_name)
        return f"{row.mapping_name} (deleted)" if row.mapping_name else NOTHING

    @admin.display(description="took", ordering="milliseconds")
    def took(self, row: HookDelivery) -> str:
        return run_time(timedelta(milliseconds=row.milliseconds))

    @admin.display(description="client")
    def client_link(self, row: HookDelivery) -> str:
        address = list_url(HookDelivery, urlencode({"client": row.client}))
        return format_html('<a class="text-link" href="{}">{}</a>', address, row.client)

    @admin.display(description="delivery id")
    def delivery_id(self, row: HookDelivery) -> str:
        return code(str(row.uid))

    @admin.display(description="idempotency key")
    def key(self, row: HookDelivery) -> str:
        return code(visible(row.idempotency_key)) if row.idempotency_key else "none"

    @admin.display(description="replay of")
    def original(self, row: HookDelivery) -> str:
        return link(row.replay_of, code(str(row.replay_of.uid))) if row.replay_of else "none"

    @admin.display(description="now")
    def now(self, row: HookDelivery) -> str:
        outcome = DeliveryOutcome(row.outcome)
        sentences = [f"{str(outcome.label).capitalize()}."]
        if outcome in _WENT_WRONG:
            sentences = [f"{outcome.value.capitalize()}: {visible(row.error)}"]
        if not row.has_body:
            sentences.append(
                "Its body was not kept, so it can neither be looked into nor replayed. The hook "
                "policy says which bodies are kept."
            )
        return paragraphs(sentences)

    @admin.display(description="answer")
    def full_answer(self, row: HookDelivery) -> str:
        status = f"{row.status} {HTTPStatus(row.status).phrase}"
        answer = {"ok": False, "error": row.error} if row.error else row.answer
        if answer is None:
            return block(status)
        return block(f"{status}\n{visible(json.dumps(answer, indent=2, ensure_ascii=False))}")

    @admin.display(description="headers")
    def full_headers(self, row: HookDelivery) -> str:
        return _pairs(row, row.headers, ": ")

    @admin.display(description="query")
    def full_query(self, row: HookDelivery) -> str:
        return _pairs(row, row.query, " = ")

    @admin.display(description="body")
    def full_body(self, row: HookDelivery) -> str:
        if row.body is None:
            return "not kept"
        text, about = body_in_words(bytes(row.body))
        return format_html('<p class="wake-note">{}</p>{}', about, block(text))

    @admin.display(description="what it would come to")
    def today(self, row: HookDelivery) -> str:
        now = timezone.now()
        try:
            arrival = arrival_again(row, now)
        except NotReplayable:
            return "not known: its body was not kept"
        trial = Trial(
            arrival.path, arrival.body, arrival.headers, arrival.query, arrival.credential
        )
        simulation = simulate(trial, configuration.hooks(), wake_configuration.gateway(), now=now)
        return simulator.steps(simulation)


def _replayed(delivery: HookDelivery) -> str:
    """Replay a delivery and return what came of it, in words."""
    try:
        made = replay(delivery, timezone.now())
    except NotAuthorized as error:
        return f"refused: {error}"
    except StorageUnavailable as error:
        return f"failed: {error}"
    outcome = DeliveryOutcome(made.outcome)
    return f"{outcome.value}: {first_line(visible(made.error))}" if made.error else outcome.value


def _of_event(uid: UUID) -> QuerySet[Any]:
    """Return the keys of the deliveries whose answer names this event."""
    try:
        made_at = _EPOCH + timedelta(milliseconds=uid.int >> 80)
        around = (made_at - _BEFORE_EVENT, made_at + _AFTER_EVENT)
    except OverflowError:  # an id that no event has
        return HookDelivery.objects.none()
    deliveries = HookDelivery.objects.filter(received_at__range=around)
    as_text = deliveries.annotate(answer_text=Cast("answer", TextField()))
    return as_text.filter(answer_text__contains=str(uid)).values("pk")


def _pairs(row: HookDelivery, values: dict[str, str], between: str) -> str:
    if not row.has_body:
        return "not kept"
    lines = (visible(f"{name}{between}{value}") for name, value in values.items())
    return block("\n".join(lines)) if values else "none"


@admin.register(FailedCredentials)
class FailedCredentialsAdmin(ReadOnlyPage):
    list_display = ("client", "failures", "last")
    list_display_links = None
    search_fields = ("client",)
    ordering = ("-updated_at",)
    actions = ("clear",)
    fields = ("client", "failures", "last")
    readonly_fields = ("failures", "last")

    @admin.action(description="Clear", permissions=["operate"])
    def clear(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        rows = list(queryset)
        FailedCredentials.objects.filter(pk__in=[row.pk for row in rows]).delete()
        self.record(request, rows, "Cleared.")
        self.message_user(request, f"{counted(len(rows), 'client')} cleared.", messages.SUCCESS)

    @admin.display(description="failures in the last minute")
    def failures(self, row: FailedCredentials) -> str:
        oldest = timezone.now().timestamp() - throttling.WINDOW_SECONDS
        recent = sum(failed_at > oldest for failed_at in row.failed_at)
        if recent < throttling.FAILURES:
            return str(recent)
        return badge(
            f"{recent}: answered with 429", "danger", "A right credential is still served."
        )

    @admin.display(description="last", ordering="updated_at")
    def last(self, row: FailedCredentials) -> str:
        return moment(row.updated_at)
