"""What is stored: agents, their sessions, the events queued for a session, and heartbeats.

The session row is the unit of work. Beside its key it holds when its next heartbeat is due and
why, the attempts so far, and the lease of the heartbeat that runs. Rows are changed by
`wake.queue` alone, except for the configuration (agents and the gateway's settings).
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta
from typing import Any, ClassVar
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.validators import MaxValueValidator, MinValueValidator, RegexValidator
from django.db import models
from django.db.models import Case, F, Q, Value, When

from wake.encryption import EncryptedTextField
from wake.session_keys import AGENT_ID_PATTERN
from wake.signing import signing_key

DEFAULT_HEARTBEAT_PROMPT = (
    "Look at the events above, if there are any, and do what they ask for. "
    "If nothing needs attention, reply HEARTBEAT_OK."
)

agent_id_validator = RegexValidator(
    rf"^{AGENT_ID_PATTERN}\Z",
    "Use 1 to 64 lower-case letters, digits, hyphens and underscores; "
    "start with a letter or digit.",
)


def validate_http_url(url: str, schemes: Collection[str] = ("http", "https")) -> None:
    """Raise ValidationError unless it is a URL of one of the schemes, with a host.

    Looser than Django's own: hosts on private networks often have one label (http://agent:8080).
    """
    try:
        parts = urlsplit(url)
        has_host = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        has_host = False
    printable = url.isprintable() and not any(character.isspace() for character in url)
    if not (has_host and printable and parts.scheme in schemes):
        raise ValidationError("Enter a URL such as https://agent.example.com/heartbeat.")


class RunnerKind(models.TextChoices):
    """How an agent is reached; one file each in wake/heartbeats/runners/."""

    NONE = "none", "none: events wait"
    COMMAND = "command", "command: a program on this machine"
    HTTP = "http", "http: a signed POST to a URL"
    INBOX = "inbox", "inbox: programs that connect to this gateway"
    OPENCLAW = "openclaw", "openclaw: another gateway, event by event"
    CHAT = "chat", "chat: an OpenAI-compatible chat server"


class IdleRuns(models.TextChoices):
    """Whether an agent has heartbeats when there is nothing to say."""

    ALWAYS = "always", "always: on schedule, and when nudged"
    WITH_EVENTS = "with-events", "only with events: nothing queued, no run"


def validate_time_zone(name: str) -> None:
    """Raise ValidationError unless it is the name of a time zone in the IANA database."""
    try:
        ZoneInfo(name)
    except (KeyError, OSError, ValueError) as error:
        raise ValidationError("Enter a time zone such as Europe/Berlin.") from error


class Agent(models.Model):
    """Something that takes turns: a program, a service, another gateway."""

    id = models.CharField(primary_key=True, max_length=64, validators=[agent_id_validator])
    name = models.CharField(
        max_length=200, blank=True, help_text="For people; the id is what requests use."
    )
    enabled = models.BooleanField(
        default=True, help_text="Wakes for a disabled agent are refused by name."
    )
    paused = models.BooleanField(
        default=False, help_text="While paused, events are accepted and wait; no heartbeat runs."
    )
    heartbeat_every = models.DurationField(
        default=timedelta(minutes=30),
        validators=[MinValueValidator(timedelta(0)), MaxValueValidator(timedelta(days=366))],
        help_text="How often the main session has a heartbeat by itself; 0 turns the schedule off.",
    )
    active_from = models.TimeField(
        null=True,
        blank=True,
        help_text="Scheduled heartbeats run from this time of day; empty: all day.",
    )
    active_until = models.TimeField(
        null=True,
        blank=True,
        help_text="… until this one, which may be on the next day. Wakes are not bound by it.",
    )
    time_zone = models.CharField(
        max_length=64,
        default="UTC",
        validators=[validate_time_zone],
        help_text="Where that time of day is read from the clock, such as Europe/Berlin.",
    )
    idle_runs = models.CharField(
        "heartbeats",
        max_length=16,
        choices=IdleRuns.choices,
        default=IdleRuns.ALWAYS,
        help_text="Whether a heartbeat runs that has no events.",
    )
    heartbeat_prompt = models.TextField(
        blank=True,
        default=DEFAULT_HEARTBEAT_PROMPT,
        help_text="Follows the events in every prompt; may be empty.",
    )
    runner = models.CharField(max_length=16, choices=RunnerKind.choices, default=RunnerKind.NONE)
    command = models.JSONField(
        default=list,
        blank=True,
        help_text="The program and its arguments. Set on the command line only: "
        "manage.py agents set ID --runner command -- PROGRAM ARGS…",
    )
    url = models.CharField(
        max_length=2000,
        blank=True,
        help_text="http: where the heartbeat is posted. openclaw: the other gateway, ws://… or "
        "wss://…. chat: the server's base URL, such as http://127.0.0.1:11434/v1.",
    )
    model = models.CharField(
        max_length=200, blank=True, help_text="chat: the model's name, as the server knows it."
    )
    key_variable = models.CharField(
        max_length=100,
        blank=True,
        help_text="chat, openclaw: the environment variable that holds the key or token. It must "
        "be in the setting AGENT_KEY_VARIABLES; the key itself is never stored.",
    )
    transcript_bytes = models.PositiveIntegerField(
        default=64 * 1024,
        validators=[MaxValueValidator(16 * 1024 * 1024)],
        help_text="chat: how much of a session's earlier turns is sent along; the oldest are left "
        "out first.",
    )
    signing_secret = EncryptedTextField(
        blank=True,
        default="",
        help_text="The Standard Webhooks secret (whsec_…) that signs what is posted to the agent's "
        "URL and its reply URL.",
    )
    timeout_seconds = models.PositiveIntegerField(
        default=600,
        validators=[MinValueValidator(1), MaxValueValidator(24 * 3600)],
        help_text="A heartbeat that takes longer is ended and counts as a failed attempt.",
    )
    max_attempts = models.PositiveSmallIntegerField(
        default=8,
        validators=[MinValueValidator(1), MaxValueValidator(100)],
        help_text="After so many failed attempts the heartbeat's events become dead letters.",
    )
    max_parallel_runs = models.PositiveSmallIntegerField(
        null=True,
        blank=True,
        validators=[MinValueValidator(1), MaxValueValidator(1000)],
        help_text="How many heartbeats of this agent run at once; empty: as many as there is room.",
    )
    max_runs_per_minute = models.PositiveSmallIntegerField(
        null=True,
        blank=True,
        default=20,
        validators=[MinValueValidator(1), MaxValueValidator(1000)],
        help_text="How many heartbeats each session has within a minute; what comes beyond waits "
        "and is handed over together. Empty: no limit.",
    )
    max_self_wakes = models.PositiveSmallIntegerField(
        null=True,
        blank=True,
        default=5,
        validators=[MinValueValidator(1), MaxValueValidator(1000)],
        help_text="How often in a row a session may be woken by its own runs alone; the next such "
        "wake is held back. Empty: no limit.",
    )
    reply_url = models.CharField(
        max_length=2000,
        blank=True,
        validators=[validate_http_url],
        help_text="Where each reply is posted, signed; empty: nowhere.",
    )
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["id"]

    def __str__(self) -> str:
        return self.id

    @property
    def needs_secret(self) -> bool:
        """Whether what is posted is to be signed, and there is nothing yet to sign it with."""
        is_signed = self.runner == RunnerKind.HTTP or bool(self.reply_url)
        return is_signed and not self.signing_secret

    def clean(self) -> None:
        if not self.enabled and GatewaySettings.objects.filter(default_agent=self.pk).exists():
            default = "This is the default agent; make another one the default first."
            raise ValidationError({"enabled": default})
        if self.signing_secret:
            try:
                signing_key(self.signing_secret)
            except ValueError as error:
                raise ValidationError({"signing_secret": str(error)}) from error
        if (self.active_from is None) != (self.active_until is None):
            raise ValidationError({"active_until": "Give both times of day, or neither."})
        if self.active_from is not None and self.active_from == self.active_until:
            raise ValidationError({"active_until": "Empty both for the whole day."})
        self._clean_target()
        if self.runner == RunnerKind.COMMAND and not self.command:
            how = f"manage.py agents set {self.id or 'ID'} --runner command -- PROGRAM ARGS…"
            raise ValidationError(
                {"runner": f"The command runner needs a command, set on the command line: {how}"}
            )

    def _clean_target(self) -> None:
        """Raise ValidationError unless the runner has what it needs."""
        if self.runner in RUNNERS_WITH_URL and not self.url:
            raise ValidationError({"url": f"The {self.runner} runner needs a URL."})
        if self.url:
            try:
                validate_http_url(self.url, ("http", "https", "ws", "wss"))
                if self.runner in (RunnerKind.HTTP, RunnerKind.CHAT):
                    validate_http_url(self.url)
            except ValidationError as error:
                raise ValidationError({"url": error.messages}) from error
        if self.runner == RunnerKind.CHAT and not self.model:
            raise ValidationError({"model": "The chat runner needs the name of a model."})
        if self.key_variable and self.key_variable not in settings.AGENT_KEY_VARIABLES:
            raise ValidationError(
                {
                    "key_variable": f"{self.key_variable} is not in the setting "
                    f"AGENT_KEY_VARIABLES: {', '.join(settings.AGENT_KEY_VARIABLES)}."
                }
            )


RUNNERS_WITH_URL = (RunnerKind.HTTP, RunnerKind.OPENCLAW, RunnerKind.CHAT)


class GatewaySettings(models.Model):
    """The gateway's own settings: exactly one row."""

    class Scope(models.TextChoices):
        PER_AGENT = "per-agent", "per agent: a session for every key"
        GLOBAL = "global", "global: one session for each agent, whatever the key"

    id = models.PositiveSmallIntegerField(primary_key=True, default=1, editable=False)
    default_agent = models.ForeignKey(
        Agent,
        on_delete=models.PROTECT,
        related_name="+",
        help_text="Meant where a request selects none.",
    )
    scope = models.CharField(max_length=16, choices=Scope.choices, default=Scope.PER_AGENT)
    main_key = models.CharField(
        max_length=64,
        default="main",
        validators=[agent_id_validator],
        help_text="The last part of every agent's main session key.",
    )
    heartbeats_enabled = models.BooleanField(
        default=True, help_text="Off pauses every heartbeat; events are accepted and wait."
    )
    max_parallel_heartbeats = models.PositiveSmallIntegerField(
        default=16,
        validators=[MinValueValidator(1), MaxValueValidator(1000)],
        help_text="How many sessions one heartbeat process works on at once.",
    )
    max_queued_events = models.PositiveIntegerField(
        default=10_000,
        validators=[MinValueValidator(1)],
        help_text="How many events one session may hold; a further one is refused.",
    )
    keep_settled_days = models.PositiveIntegerField(
        default=90,
        validators=[MinValueValidator(1), MaxValueValidator(3660)],
        help_text="Older delivered and discarded events, and heartbeats, are removed, once an "
        "hour. Queued events and dead letters never are.",
    )

    class Meta:
        verbose_name = verbose_name_plural = "gateway settings"
        constraints: ClassVar = [
            models.CheckConstraint(condition=Q(id=1), name="gateway_settings_is_one_row")
        ]

    def __str__(self) -> str:
        return "gateway settings"

    def clean(self) -> None:
        if self.default_agent_id and not self.default_agent.enabled:
            raise ValidationError({"default_agent": "The default agent must be enabled."})

    @classmethod
    def ensure(cls) -> GatewaySettings:
        """Return the one row; make it and the default agent `main` where they are missing."""
        existing = cls.objects.first()
        if existing:
            return existing
        agent, _ = Agent.objects.get_or_create(pk="main", defaults={"name": "Main"})
        return cls.objects.get_or_create(pk=1, defaults={"default_agent": agent})[0]


class DueReason(models.TextChoices):
    """Why a session's next heartbeat is due."""

    WAKE = "wake", "wake"
    SCHEDULE = "schedule", "schedule"
    RETRY = "retry", "retry after a failure"
    RECOVERY = "recovery", "recovery of a lost heartbeat"
    REQUEUE = "requeue", "requeued dead letters"
    OPERATOR = "operator", "a person"


# Which due session goes first: a person's, then what was woken, then what is only scheduled.
PRIORITIES = (0, 1, 2)
_FIRST, _USUAL, _LAST = PRIORITIES
_FIRST_REASONS = (DueReason.OPERATOR, DueReason.REQUEUE)


def priority_of(reason: str) -> int:
    """Return the place of a reason in that order, as the database has it in `Session.priority`."""
    if reason in _FIRST_REASONS:
        return _FIRST
    return _LAST if reason == DueReason.SCHEDULE else _USUAL


class HoldReason(models.TextChoices):
    """Which guard of its agent holds a session back; `wake.guards` says when."""

    RATE = "rate", "the limit of runs a minute"
    SELF_WAKES = "self-wakes", "the limit of wakes by its own runs"


class Session(models.Model):
    """One conversation of one agent, and the work that is due in it."""

    # Without an index of its own: with one, a plan may read all sessions of an agent to find one.
    agent = models.ForeignKey(
        Agent, on_delete=models.PROTECT, db_index=False, related_name="sessions"
    )
    key = models.CharField(max_length=512)
    queued = models.PositiveIntegerField(default=0, help_text="Events in the state queued.")
    due_at = models.DateTimeField(null=True, blank=True)
    due_reason = models.CharField(max_length=16, choices=DueReason.choices, blank=True, default="")
    priority = models.GeneratedField(
        expression=Case(
            When(due_reason__in=_FIRST_REASONS, then=Value(_FIRST)),
            When(due_reason=DueReason.SCHEDULE, then=Value(_LAST)),
            default=Value(_USUAL),
        ),
        output_field=models.SmallIntegerField(),
        db_persist=True,
    )
    # Until when a guard lets no heartbeat begin, and which one; `due_at` is not before that.
    held_until = models.DateTimeField(null=True, blank=True)
    held_by = models.CharField(max_length=16, choices=HoldReason.choices, blank=True, default="")
    # Heartbeats in a row whose events all came from the session's own runs.
    own_runs = models.PositiveIntegerField(default=0)
    # Attempts at the present batch of events, the running one included; 0 when nothing failed.
    attempts = models.PositiveSmallIntegerField(default=0)
    # The last event of the batch that was handed to the agent and is not settled yet: a retry
    # takes the same events, so that newer ones do not inherit its failures.
    batch_through = models.PositiveBigIntegerField(null=True, blank=True)
    # The lease: the run id of the heartbeat that holds it (the fencing token), who runs it, and
    # until when it is believed to live.
    lease_token = models.UUIDField(null=True, blank=True)
    lease_owner = models.CharField(max_length=200, blank=True, default="")
    lease_until = models.DateTimeField(null=True, blank=True)
    last_event_at = models.DateTimeField(null=True, blank=True)
    # Of the newest event, while that is queued (`queue.enqueue`). Empty: not known, look at it.
    newest_digest = models.CharField(max_length=16, blank=True, default="")
    last_heartbeat_at = models.DateTimeField(null=True, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints: ClassVar = [
            # A key names its agent under the scope `per-agent`; under `global` all keys are equal.
            models.UniqueConstraint(fields=["agent", "key"], name="session_agent_key_unique"),
            # Never stall: no queued event without a due or a running heartbeat.
            models.CheckConstraint(
                condition=Q(queued=0) | Q(due_at__isnull=False) | Q(lease_token__isnull=False),
                name="session_queued_is_due_or_running",
            ),
            models.CheckConstraint(
                condition=Q(lease_token__isnull=True, lease_until__isnull=True)
                | Q(lease_token__isnull=False, lease_until__isnull=False),
                name="session_lease_is_whole",
            ),
        ]
        indexes: ClassVar = [
            # queue.claim: the sessions of an agent that are due and free, by priority, and within
            # one the longest due first.
            models.Index(
                fields=["agent", "priority", "due_at", "id"],
                condition=Q(due_at__isnull=False, lease_token__isnull=True),
                name="session_due",
            ),
            # queue.next_due, correct_due_times and keep_schedules: what is due when, of all agents.
            models.Index(
                fields=["due_at"], condition=Q(due_at__isnull=False), name="session_due_at"
            ),
            # queue.reap: leases that ran out.
            models.Index(
                fields=["lease_until"],
                condition=Q(lease_token__isnull=False),
                name="session_leased",
            ),
        ]

    def __str__(self) -> str:
        return self.key


class EventState(models.TextChoices):
    QUEUED = "queued", "queued"
    DELIVERED = "delivered", "delivered"
    DEAD = "dead", "dead letter"
    DISCARDED = "discarded", "discarded"


class SystemEvent(models.Model):
    """One short text for one session. `id` gives the order; `uid` is what the world sees."""

    id = models.BigAutoField(primary_key=True)
    uid = models.UUIDField(unique=True, editable=False, verbose_name="event id")
    # No index of its own: `event_session` begins with it.
    session = models.ForeignKey(
        Session, on_delete=models.PROTECT, related_name="events", db_index=False
    )
    text = models.TextField()
    source = models.CharField(max_length=200, help_text="Where it came from: cli, ws, hook:NAME, …")
    external = models.BooleanField(
        default=False, help_text="Came from outside: set apart in the prompt as data."
    )
    # A turn of its own (AgentTurn): handed over alone, never coalesced.
    alone = models.BooleanField(default=False, db_default=False)
    # A run of the same session sent it.
    own = models.BooleanField(default=False, db_default=False)
    state = models.CharField(max_length=16, choices=EventState.choices, default=EventState.QUEUED)
    created_at = models.DateTimeField()
    settled_at = models.DateTimeField(null=True, blank=True)
    heartbeat = models.ForeignKey(
        "Heartbeat",
        on_delete=models.SET_NULL,
        null=True,
        blank=True,
        db_index=False,
        related_name="events",
        help_text="The run that settled it.",
    )

    class Meta:
        indexes: ClassVar = [
            # queue.claim: a session's queued events in order; the newest one, for coalescing. One
            # index of a session's events, because each costs every wake a page of its own.
            models.Index(fields=["session", "state", "id"], name="event_session"),
            # What a run settled; most of what comes is not settled yet.
            models.Index(
                fields=["heartbeat"], condition=Q(heartbeat__isnull=False), name="event_heartbeat"
            ),
            # The admin's dead letters; few rows, so the index stays small.
            models.Index(fields=["session", "id"], condition=Q(state="dead"), name="event_dead"),
        ]

    def __str__(self) -> str:
        return str(self.uid)


class AgentTurn(models.Model):
    """A turn that was asked for as such: one event, handed over alone. Its id is the event's `uid`.

    The outcome is the event's: its state, and the reply or error of the heartbeat that settled it.
    """

    event = models.OneToOneField(
        SystemEvent, on_delete=models.CASCADE, primary_key=True, related_name="turn"
    )
    name = models.CharField(max_length=100)
    timeout_seconds = models.PositiveIntegerField(
        null=True, blank=True, help_text="Empty: as the agent says."
    )
    # The note about the outcome, for the agent's main session.
    deliver = models.BooleanField(default=True)
    note_mode = models.CharField(max_length=16)
    noted_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        indexes: ClassVar = [
            # heartbeats.turns: whose note is still to be written.
            models.Index(
                fields=["event"],
                condition=Q(deliver=True, noted_at__isnull=True),
                name="turn_to_note",
            ),
        ]

    def __str__(self) -> str:
        return self.name


class HeartbeatStatus(models.TextChoices):
    RUNNING = "running", "running"
    DELIVERED = "delivered", "delivered"
    QUIET = "quiet", "quiet"
    FAILED = "failed", "failed"
    LOST = "lost", "lost: its process died"
    RELEASED = "released", "released: its process stopped"


class Heartbeat(models.Model):
    """One turn of a session: one attempt to hand its queued events to its agent."""

    run_id = models.UUIDField(unique=True, editable=False)
    session = models.ForeignKey(Session, on_delete=models.PROTECT, related_name="heartbeats")
    reason = models.CharField(max_length=16, choices=DueReason.choices)
    attempt = models.PositiveSmallIntegerField(default=1)
    runner = models.CharField(max_length=16, choices=RunnerKind.choices, blank=True, default="")
    status = models.CharField(
        max_length=16, choices=HeartbeatStatus.choices, default=HeartbeatStatus.RUNNING
    )
    event_count = models.PositiveIntegerField(default=0)
    started_at = models.DateTimeField()
    finished_at = models.DateTimeField(null=True, blank=True)
    prompt = models.TextField(blank=True, default="")
    reply = models.TextField(blank=True, default="")
    error = models.TextField(blank=True, default="")

    class Meta:
        constraints: ClassVar = [
            # One heartbeat at a time per session.
            models.UniqueConstraint(
                fields=["session"], condition=Q(status="running"), name="heartbeat_one_running"
            )
        ]
        indexes: ClassVar = [
            # The gateway's last-heartbeat method, and the admin's list.
            models.Index(F("started_at").desc(), name="heartbeat_started"),
            # activity.last_minutes: what ended in a minute.
            models.Index(fields=["finished_at"], name="heartbeat_finished"),
        ]

    def __str__(self) -> str:
        return str(self.run_id)

    @property
    def duration(self) -> timedelta | None:
        return self.finished_at - self.started_at if self.finished_at else None


class ReplyState(models.TextChoices):
    PENDING = "pending", "pending"
    SENT = "sent", "sent"
    FAILED = "failed", "failed"


class ReplyPost(models.Model):
    """A reply on its way to its agent's reply URL. Changed by `wake.heartbeats.replies` alone."""

    heartbeat = models.OneToOneField(
        Heartbeat, on_delete=models.CASCADE, primary_key=True, related_name="reply_post"
    )
    state = models.CharField(max_length=16, choices=ReplyState.choices, default=ReplyState.PENDING)
    attempts = models.PositiveSmallIntegerField(default=0)
    # When the next attempt is due; during one, when it counts as lost.
    due_at = models.DateTimeField(null=True, blank=True)
    error = models.TextField(blank=True, default="")
    created_at = models.DateTimeField()
    settled_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        constraints: ClassVar = [
            models.CheckConstraint(
                condition=Q(state="pending", due_at__isnull=False)
                | (~Q(state="pending") & Q(due_at__isnull=True)),
                name="reply_post_pending_is_due",
            ),
        ]
        indexes: ClassVar = [
            # heartbeats.replies: what is due.
            models.Index(fields=["due_at"], condition=Q(state="pending"), name="reply_post_due"),
        ]

    def __str__(self) -> str:
        return f"reply of {self.heartbeat_id}"


class AgentReach(models.Model):
    """How one heartbeat process reaches an agent, where that is not the same for all of them.

    Written by each process for itself when it changes and every so often; old rows say nothing.
    """

    agent = models.ForeignKey(Agent, on_delete=models.CASCADE, related_name="reaches")
    owner = models.CharField(max_length=200, help_text="The heartbeat process.")
    clients = models.PositiveIntegerField(default=0, help_text="inbox: who is connected there.")
    capacity = models.PositiveIntegerField(default=0, help_text="inbox: their places together.")
    problem = models.TextField(
        blank=True, default="", help_text="openclaw: why the other gateway is not reached."
    )
    seen_at = models.DateTimeField()

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["agent", "owner"], name="agent_reach_unique")
        ]

    def __str__(self) -> str:
        return f"{self.agent_id} from {self.owner}"


class Tally(models.Model):
    """A running count, kept in the transaction that it counts; `wake.metrics` reads and writes it.

    Several rows, one for each `shard`, add up to one count, so that processes do not wait for each
    other's rows.
    """

    name = models.CharField(max_length=64)
    labels = models.CharField(max_length=200, blank=True, default="")
    shard = models.PositiveSmallIntegerField(default=0)
    value = models.FloatField(default=0.0)

    class Meta:
        verbose_name_plural = "tallies"
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["name", "labels", "shard"], name="tally_unique")
        ]

    def __str__(self) -> str:
        return f"{self.name}{{{self.labels}}}"


class HashedToken(models.Model):
    """A bearer token of which only a hash is kept. Made and checked in `wake.tokens`."""

    name = models.CharField(max_length=100, unique=True)
    digest = models.CharField(max_length=64, unique=True, editable=False)
    hint = models.CharField(
        max_length=16, editable=False, help_text="The token's first characters."
    )
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField(null=True, blank=True, help_text="Empty: never.")
    revoked_at = models.DateTimeField(null=True, blank=True, editable=False)
    last_used_at = models.DateTimeField(null=True, blank=True, editable=False)

    class Meta:
        abstract = True
        ordering = ["name"]

    def __str__(self) -> str:
        return self.name


class OperatorScope(models.TextChoices):
    """What an operator's connection may do; `wake.gateway.scopes` says which covers which."""

    READ = "operator.read", "read: see sessions and heartbeats"
    WRITE = "operator.write", "write: also send events"
    ADMIN = "operator.admin", "admin: also turn heartbeats on and off"


def every_scope() -> list[str]:
    """Return the scopes of a token for which none are chosen."""
    return list(OperatorScope.values)


def validate_scopes(scopes: object) -> None:
    """Raise ValidationError unless it is a list of operator scopes, each there once."""
    if not isinstance(scopes, list):
        raise ValidationError("Give a list of scopes.")
    for place, scope in enumerate(scopes):
        if scope not in OperatorScope.values:
            raise ValidationError(f"{str(scope)[:100]} is no scope.")
        if scope in scopes[:place]:
            raise ValidationError(f"{scope} stands there twice.")


class GatewayToken(HashedToken):
    """A credential for the gateway's WebSocket."""

    scopes: models.JSONField[list[str], list[str]] = models.JSONField(
        default=every_scope,
        # A process that does not know the column yet makes tokens that hold everything, as ever.
        db_default=every_scope(),
        validators=[validate_scopes],
        error_messages={"blank": "Choose at least one scope."},
        help_text="What the token may be used for.",
    )
    agent = models.ForeignKey(
        Agent,
        on_delete=models.CASCADE,
        null=True,
        blank=True,
        related_name="tokens",
        help_text="A program that connects with it may take this agent's heartbeats (runner "
        "inbox); empty: nobody's, unless its scopes say so.",
    )

    def clean_fields(self, exclude: Collection[str] | None = None) -> None:
        """Check each field. A token that is bound to an agent need not hold a scope."""
        if self.agent_id and self.scopes == []:
            exclude = {*(exclude or ()), "scopes"}
        super().clean_fields(exclude)


class PresenceEntry(models.Model):
    """What a node last said of itself in a `Node:` line, by the node's own id."""

    key = models.CharField(primary_key=True, max_length=255)
    host = models.CharField(max_length=255, blank=True, default="")
    ip = models.CharField(max_length=100, blank=True, default="")
    version = models.CharField(max_length=100, blank=True, default="")
    mode = models.CharField(max_length=100, blank=True, default="")
    reason = models.CharField(max_length=255, blank=True, default="")
    text = models.TextField(blank=True, default="")
    details: models.JSONField[Any, Any] = models.JSONField(default=dict, blank=True)
    seen_at = models.DateTimeField()

    class Meta:
        verbose_name_plural = "presence entries"

    def __str__(self) -> str:
        return self.key
