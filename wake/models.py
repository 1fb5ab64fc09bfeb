"""What is stored: agents, their sessions, the events queued for a session, and heartbeats.

The session row is the unit of work. Beside its key it holds when its next heartbeat is due and
why, the attempts so far, and the lease of the heartbeat that runs. Rows are changed by
`wake.queue` alone, except for the configuration (agents and the gateway's settings).
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, ClassVar
from urllib.parse import urlsplit

from django.core.exceptions import ValidationError
from django.core.validators import MaxValueValidator, MinValueValidator, RegexValidator
from django.db import models
from django.db.models import F, Q

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


def validate_http_url(url: str) -> None:
    """Raise ValidationError unless it is an http or https URL with a host.

    Looser than Django's own: hosts on private networks often have one label (http://agent:8080).
    """
    try:
        parts = urlsplit(url)
        has_host = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        has_host = False
    printable = url.isprintable() and not any(character.isspace() for character in url)
    if not (has_host and printable and parts.scheme in {"http", "https"}):
        raise ValidationError("Enter a URL such as https://agent.example.com/heartbeat.")


class RunnerKind(models.TextChoices):
    """How an agent is reached; one file each in wake/heartbeats/runners/."""

    NONE = "none", "none: events wait"
    COMMAND = "command", "command: a program on this machine"
    HTTP = "http", "http: a signed POST to a URL"


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
        validators=[validate_http_url],
        help_text="Where the http runner posts the heartbeat.",
    )
    signing_secret = EncryptedTextField(
        blank=True,
        default="",
        help_text="The Standard Webhooks secret (whsec_…) that signs the http runner's requests.",
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
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["id"]

    def __str__(self) -> str:
        return self.id

    def clean(self) -> None:
        if not self.enabled and GatewaySettings.objects.filter(default_agent=self.pk).exists():
            default = "This is the default agent; make another one the default first."
            raise ValidationError({"enabled": default})
        if self.signing_secret:
            try:
                signing_key(self.signing_secret)
            except ValueError as error:
                raise ValidationError({"signing_secret": str(error)}) from error
        if self.runner == RunnerKind.HTTP and not self.url:
            raise ValidationError({"url": "The http runner needs a URL."})
        if self.runner == RunnerKind.COMMAND and not self.command:
            how = f"manage.py agents set {self.id or 'ID'} --runner command -- PROGRAM ARGS…"
            raise ValidationError(
                {"runner": f"The command runner needs a command, set on the command line: {how}"}
            )


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
    OPERATOR = "operator", "an operator"


class Session(models.Model):
    """One conversation of one agent, and the work that is due in it."""

    agent = models.ForeignKey(Agent, on_delete=models.PROTECT, related_name="sessions")
    key = models.CharField(max_length=512)
    queued = models.PositiveIntegerField(default=0, help_text="Events in the state queued.")
    due_at = models.DateTimeField(null=True, blank=True)
    due_reason = models.CharField(max_length=16, choices=DueReason.choices, blank=True, default="")
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
            # queue.claim: the sessions of an agent that are due and free, the longest due first.
            models.Index(
                fields=["agent", "due_at", "id"],
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
    session = models.ForeignKey(Session, on_delete=models.PROTECT, related_name="events")
    text = models.TextField()
    source = models.CharField(max_length=200, help_text="Where it came from: cli, ws, hook:NAME, …")
    external = models.BooleanField(
        default=False, help_text="Came from outside: set apart in the prompt as data."
    )
    # A turn of its own (AgentTurn): handed over alone, never coalesced.
    alone = models.BooleanField(default=False, db_default=False)
    state = models.CharField(max_length=16, choices=EventState.choices, default=EventState.QUEUED)
    created_at = models.DateTimeField()
    settled_at = models.DateTimeField(null=True, blank=True)
    heartbeat = models.ForeignKey(
        "Heartbeat",
        on_delete=models.SET_NULL,
        null=True,
        blank=True,
        related_name="events",
        help_text="The run that settled it.",
    )

    class Meta:
        indexes: ClassVar = [
            # queue.claim: a session's queued events in order; the newest one, for coalescing.
            models.Index(
                fields=["session", "id"], condition=Q(state="queued"), name="event_queued"
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
