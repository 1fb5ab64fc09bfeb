"""What an operator sets for the HTTP ingress, and what came in through it.

Set are the policy, its prefixes, tokens and mappings. What came in is the deliveries, the
idempotency keys of the last day, and the clients that showed wrong credentials a moment ago.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

from django.core.exceptions import ValidationError
from django.core.validators import MaxValueValidator, MinValueValidator, RegexValidator
from django.db import models
from django.db.models import Q
from django.db.models.functions import Lower

from hooks import signatures, transforms
from hooks.template import Template, TemplateError
from wake import configuration, dispatch
from wake.encryption import EncryptedTextField
from wake.errors import SessionKeyError, WakeError
from wake.models import Agent, HashedToken

# The first part of every other address of this site, kept for later ones too: hooks cannot live
# there, because they would never be reached or would stand in the way.
RESERVED_PATHS: Final = frozenset(
    {"admin", "api", "healthz", "media", "metrics", "readyz", "static", "ws"}
)
# Endpoints of their own below the base path; a mapping there would never be reached.
ENDPOINTS: Final = frozenset({"agent", "wake"})

# The smallest and the largest limit of a body that a policy may set, in bytes.
BODY_BYTES: Final = (1024, 16 * 1024 * 1024)
LONGEST_TURN_SECONDS: Final = 24 * 3600


class KeepBodies(models.TextChoices):
    """Which deliveries keep what was sent."""

    ALWAYS = "always", "always"
    FAILURES = "failures", "only of failures: what was refused or could not be stored"
    NEVER = "never", "never"


class HookPolicy(models.Model):
    """What is allowed at the HTTP door: exactly one row."""

    id = models.PositiveSmallIntegerField(primary_key=True, default=1, editable=False)
    enabled = models.BooleanField(
        default=True, help_text="Off answers every hook with 404, as if there were none."
    )
    base_path = models.CharField(
        max_length=100,
        default="/hooks",
        validators=[
            RegexValidator(
                r"^/[A-Za-z0-9_-]+(?:/[A-Za-z0-9_-]+)*\Z",
                "Use a path such as /hooks: a slash at the start and none at the end, not / alone.",
            )
        ],
        help_text="Where hooks live on this site. Never the root.",
    )
    allow_request_session_key = models.BooleanField(
        default=False,
        verbose_name="requests may choose the session",
        help_text="On lets a request name its session key (sessionKey), and lets a mapping's key "
        "be a template filled from the payload. List prefixes below before you turn it on.",
    )
    max_body_bytes = models.PositiveIntegerField(
        default=256 * 1024,
        validators=[MinValueValidator(BODY_BYTES[0]), MaxValueValidator(BODY_BYTES[1])],
        help_text="A larger body is refused with 413.",
    )
    default_session_key = models.CharField(
        max_length=512,
        blank=True,
        help_text="The session of a turn (/hooks/agent, or a mapping's action agent) that names "
        "none. Empty: each gets a session of its own, hook: and a random id.",
    )
    allowed_agents = models.ManyToManyField(
        Agent,
        blank=True,
        related_name="+",
        help_text="Hooks reach these agents only. None chosen: every agent.",
    )
    keep_bodies = models.CharField(
        max_length=16,
        choices=KeepBodies.choices,
        default=KeepBodies.ALWAYS,
        help_text="Which deliveries keep their body, query and harmless headers. Only those can be "
        "looked into and replayed. Credentials are never kept.",
    )
    keep_deliveries_days = models.PositiveIntegerField(
        default=30,
        validators=[MinValueValidator(1), MaxValueValidator(3660)],
        help_text="Older deliveries are removed, once an hour.",
    )
    keep_deliveries_count = models.PositiveIntegerField(
        default=100_000,
        validators=[MinValueValidator(1)],
        help_text="Of more deliveries the oldest are removed, once an hour.",
    )

    class Meta:
        verbose_name = verbose_name_plural = "hook policy"
        constraints: ClassVar = [
            models.CheckConstraint(condition=Q(id=1), name="hook_policy_is_one_row")
        ]

    def __str__(self) -> str:
        return "hook policy"

    def clean(self) -> None:
        first = self.base_path.strip("/").partition("/")[0].lower()
        if first in RESERVED_PATHS:
            raise ValidationError(
                {"base_path": f"/{first} belongs to another part of this site; use another path."}
            )
        self.default_session_key = self.default_session_key.strip()
        # A key that names an agent is meant for the requests that select it.
        head, _, rest = self.default_session_key.partition(":")
        named = rest.partition(":")[0] if head.lower() == "agent" else ""
        try:
            dispatch.resolve_session(self.default_session_key, named, configuration.gateway())
        except WakeError as error:
            raise ValidationError({"default_session_key": str(error)}) from error

    @classmethod
    def ensure(cls) -> HookPolicy:
        """Return the one row, made with its defaults where it is missing."""
        return cls.objects.get_or_create(pk=1)[0]


class AllowedSessionPrefix(models.Model):
    """What a hook's session key must start with: any of the list. An empty list allows all."""

    policy = models.ForeignKey(
        HookPolicy, on_delete=models.CASCADE, default=1, editable=False, related_name="prefixes"
    )
    prefix = models.CharField(
        max_length=200,
        help_text="For example hook: or agent:main:hook: (compared in lower case).",
    )

    class Meta:
        ordering = ["prefix"]
        constraints: ClassVar = [
            models.UniqueConstraint(Lower("prefix"), name="allowed_session_prefix_unique")
        ]

    def __str__(self) -> str:
        return self.prefix

    def clean(self) -> None:
        self.prefix = self.prefix.strip()
        if not self.prefix:
            raise ValidationError({"prefix": "An empty prefix would allow every key."})


class HookToken(HashedToken):
    """A bearer token that a sender of hooks shows."""

    # A flag beside the list: a token does not become good for everything when the last mapping
    # that it was limited to is deleted.
    limited = models.BooleanField(
        default=False,
        db_default=False,
        verbose_name="only for some mappings",
        help_text="On: the token opens the mappings chosen below and nothing else, neither "
        "/hooks/wake nor /hooks/agent.",
    )
    mappings: models.ManyToManyField[HookMapping, Any] = models.ManyToManyField(
        "HookMapping",
        blank=True,
        related_name="tokens",
        help_text="What a limited token may use.",
    )


class SignatureScheme(models.TextChoices):
    """How a sender signs; what each means is in `hooks.signatures`."""

    NONE = "", "none: a hook token is needed"
    GITHUB = "github", "GitHub (X-Hub-Signature-256)"
    STANDARD_WEBHOOKS = "standard-webhooks", "Standard Webhooks (webhook-signature)"
    STRIPE = "stripe", "Stripe (Stripe-Signature)"
    SLACK = "slack", "Slack (X-Slack-Signature)"
    HMAC = "hmac", "HMAC in a header of your choice"


class HookMapping(models.Model):
    """Turns one kind of request into a wake. The first enabled mapping that matches acts."""

    class Action(models.TextChoices):
        WAKE = "wake", "wake: an event for a session"
        AGENT = "agent", "agent: a turn of its own"

    class Mode(models.TextChoices):
        NOW = "now", "now"
        NEXT_HEARTBEAT = "next-heartbeat", "next-heartbeat: wait for the schedule"

    class SignatureDigest(models.TextChoices):
        SHA256 = "sha256", "SHA-256"
        SHA512 = "sha512", "SHA-512"
        SHA1 = "sha1", "SHA-1"

    class SignatureEncoding(models.TextChoices):
        HEX = "hex", "hexadecimal"
        BASE64 = "base64", "base64"

    name = models.CharField(max_length=100, unique=True)
    position = models.PositiveIntegerField(default=0, db_index=True, help_text="Lower comes first.")
    enabled = models.BooleanField(default=True)
    match_path = models.CharField(
        max_length=200,
        blank=True,
        help_text="The path below the hooks' base path, for example github or ci/build. "
        "Outer slashes do not matter. Empty: every path.",
    )
    match_source = models.CharField(
        max_length=200,
        blank=True,
        help_text='If set, the payload\'s string "source" must equal it.',
    )
    signature_scheme = models.CharField(
        max_length=32,
        choices=SignatureScheme.choices,
        blank=True,
        default=SignatureScheme.NONE,
        verbose_name="signature",
        help_text="How the sender signs. A hook token is accepted as well.",
    )
    signing_secret = EncryptedTextField(
        blank=True, default="", help_text="The secret that the sender signs with."
    )
    previous_signing_secret = EncryptedTextField(
        blank=True, default="", help_text="Accepted as well, while senders change over."
    )
    signature_header = models.CharField(
        max_length=100,
        blank=True,
        validators=[
            RegexValidator(r"^[A-Za-z0-9-]+\Z", "Use letters, digits and hyphens: X-Signature.")
        ],
        help_text="The header that carries the signature, for example X-Signature.",
    )
    signature_prefix = models.CharField(
        max_length=20,
        blank=True,
        help_text="What stands before the signature in the header, for example sha256=.",
    )
    signature_digest = models.CharField(
        max_length=8, choices=SignatureDigest.choices, default=SignatureDigest.SHA256
    )
    signature_encoding = models.CharField(
        max_length=8, choices=SignatureEncoding.choices, default=SignatureEncoding.HEX
    )
    action = models.CharField(max_length=16, choices=Action.choices, default=Action.WAKE)
    mode = models.CharField(
        max_length=16,
        choices=Mode.choices,
        default=Mode.NOW,
        help_text="For a turn of its own: when the note about its outcome is to be read.",
    )
    agent = models.ForeignKey(
        Agent,
        on_delete=models.PROTECT,
        null=True,
        blank=True,
        related_name="+",
        help_text="Empty: the default agent.",
    )
    session_key = models.CharField(
        max_length=512,
        blank=True,
        help_text="A fixed session key, or a template such as hook:{{payload.id}}. "
        "Empty: a wake fans out; a turn goes to the policy's default session.",
    )
    for_each = models.CharField(
        max_length=100,
        blank=True,
        validators=[
            RegexValidator(r"^[\w$@:/-]+\Z", "Name one field of the payload, at its top: messages.")
        ],
        help_text="A top-level array of the payload: one action for each of its items, 200 at "
        "most. In templates, transform and key the array then holds that item alone: "
        "{{messages[0].subject}}.",
    )
    transform = models.CharField(
        max_length=100,
        blank=True,
        help_text="A Python function, registered under this name, that may set the text, the mode "
        "and the session key, or decide to do nothing.",
    )
    text_template = models.TextField(
        blank=True,
        help_text="The event's text, for example: {{payload.repository.name}}: {{payload.action}}. "
        "May be empty when the transform writes the text.",
    )
    deliver = models.BooleanField(
        default=True,
        help_text="When the turn has ended, a note with its outcome goes to the agent's main "
        "session.",
    )
    timeout_seconds = models.PositiveIntegerField(
        null=True,
        blank=True,
        validators=[MinValueValidator(1), MaxValueValidator(LONGEST_TURN_SECONDS)],
        help_text="How long the turn may take. Empty: as the agent says.",
    )

    class Meta:
        ordering = ["position", "pk"]

    def __str__(self) -> str:
        return self.name

    def clean(self) -> None:
        errors: dict[str, str] = {}
        self.match_path = self.match_path.strip().strip("/")
        if self.match_path in ENDPOINTS:
            errors["match_path"] = f"{self.match_path} is an endpoint of its own; use another path."
        for name in ("session_key", "text_template"):
            try:
                template = Template.parse(getattr(self, name))
                if name == "session_key" and not template.expressions:
                    self._check_fixed_session_key()
            except (TemplateError, SessionKeyError) as error:
                errors[name] = str(error)
        if self.transform and self.transform not in transforms.names():
            errors["transform"] = f'no transform is registered as "{self.transform}"'
        if not self.text_template.strip() and not self.transform:
            errors["text_template"] = "Write a text, or choose a transform that does."
        errors |= self._signature_errors()
        if errors:
            raise ValidationError(errors)

    def _check_fixed_session_key(self) -> None:
        snapshot = configuration.gateway()
        if self.agent_id is None or self.agent_id in snapshot.agents:
            dispatch.resolve_session(self.session_key, self.agent_id, snapshot)

    def _signature_errors(self) -> dict[str, str]:
        if not self.signature_scheme:
            return {}
        errors: dict[str, str] = {}
        if not self.signing_secret:
            missing = "A signature needs the secret that the sender signs with."
            errors["signing_secret"] = missing
        if self.signature_scheme == SignatureScheme.HMAC and not self.signature_header:
            errors["signature_header"] = "Name the header that carries the signature."
        for name in ("signing_secret", "previous_signing_secret"):
            try:
                signatures.check_secret(SignatureScheme(self.signature_scheme), getattr(self, name))
            except ValueError as error:
                errors[name] = str(error)
        return errors


class DeliveryOutcome(models.TextChoices):
    """What became of a request that passed the credential."""

    QUEUED = "queued", "queued"
    COALESCED = "coalesced", "coalesced: an equal event was waiting"
    REPLAYED = "replayed", "replayed: the same idempotency key came before"
    IGNORED = "ignored", "ignored: the mapping had nothing to do"
    ANSWERED = "answered", "answered: the sender's check of the address"
    REFUSED = "refused", "refused"
    FAILED = "failed", "failed: could not be stored, or a defect"


class HookDelivery(models.Model):
    """One request that passed the credential, and what became of it. Written in `hooks.deliveries`.

    `body`, `query` and `headers` are empty where the policy keeps none.
    """

    uid = models.UUIDField(unique=True, editable=False, verbose_name="delivery id")
    received_at = models.DateTimeField(db_index=True)
    milliseconds = models.FloatField(help_text="From the request's arrival until it was decided.")
    client = models.CharField(max_length=64, help_text="The sender's address.")
    credential = models.CharField(max_length=150, help_text="The token, or the signed mapping.")
    # The mappings that the credential opened, by id; null for all. A replay opens no others.
    credential_mappings: models.JSONField[Any, Any] = models.JSONField(null=True)
    path = models.CharField(max_length=500, help_text="Below the hooks' base path.")
    mapping = models.ForeignKey(
        HookMapping,
        on_delete=models.SET_NULL,
        null=True,
        blank=True,
        db_index=False,
        related_name="+",
    )
    mapping_name = models.CharField(max_length=100, blank=True)
    status = models.PositiveSmallIntegerField(help_text="The HTTP status of the answer.")
    outcome = models.CharField(max_length=16, choices=DeliveryOutcome.choices)
    error = models.TextField(blank=True)
    answer: models.JSONField[Any, Any] = models.JSONField(null=True)
    idempotency_key = models.CharField(max_length=200, blank=True)
    replay_of = models.ForeignKey(
        "self",
        on_delete=models.SET_NULL,
        null=True,
        blank=True,
        db_index=False,
        related_name="replays",
    )
    has_body = models.BooleanField(default=False)
    body = models.BinaryField(null=True)
    headers: models.JSONField[Any, Any] = models.JSONField(default=dict)
    query: models.JSONField[Any, Any] = models.JSONField(default=dict)

    class Meta:
        verbose_name_plural = "hook deliveries"
        indexes: ClassVar = [
            # The admin's list of what went wrong; few rows, so the index stays small.
            models.Index(
                fields=["id"],
                condition=Q(outcome__in=["refused", "failed"]),
                name="delivery_failures",
            ),
            # Not `db_index`: PostgreSQL would get a second one, for parts of addresses.
            models.Index(fields=["client", "id"], name="delivery_client"),
            # What most deliveries have not, costs them nothing.
            models.Index(
                fields=["mapping"], condition=Q(mapping__isnull=False), name="delivery_mapping"
            ),
            models.Index(
                fields=["replay_of"],
                condition=Q(replay_of__isnull=False),
                name="delivery_replay_of",
            ),
        ]

    def __str__(self) -> str:
        return str(self.uid)


class IdempotencyKey(models.Model):
    """The first answer to an idempotency key. The primary key makes sure that there is one."""

    # A hash of credential, path and key; see `hooks.idempotency`.
    digest = models.CharField(primary_key=True, max_length=64)
    answer: models.JSONField[Any, Any] = models.JSONField(null=True)
    created_at = models.DateTimeField(db_index=True)

    def __str__(self) -> str:
        return self.digest


class FailedCredentials(models.Model):
    """A client that showed wrong credentials within the last minute; see `hooks.throttling`."""

    client = models.CharField(primary_key=True, max_length=64)
    # Seconds since the epoch, the newest last; no more than decide.
    failed_at: models.JSONField[Any, Any] = models.JSONField(default=list)
    updated_at = models.DateTimeField(db_index=True)

    class Meta:
        verbose_name_plural = "failed credentials"

    def __str__(self) -> str:
        return self.client
