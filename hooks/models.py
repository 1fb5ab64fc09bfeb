"""What an operator sets for the HTTP ingress: policy, prefixes, tokens and mappings."""

from __future__ import annotations

from typing import ClassVar, Final

from django.core.exceptions import ValidationError
from django.core.validators import MaxValueValidator, MinValueValidator, RegexValidator
from django.db import models
from django.db.models import Q
from django.db.models.functions import Lower

from hooks.template import Template, TemplateError
from wake import configuration, dispatch
from wake.errors import SessionKeyError
from wake.models import Agent, HashedToken

# The first part of every other address of this site, kept for later ones too: hooks cannot live
# there, because they would never be reached or would stand in the way.
RESERVED_PATHS: Final = frozenset({"admin", "api", "media", "static", "ws"})
# Endpoints of their own below the base path; a mapping there would never be reached.
ENDPOINTS: Final = frozenset({"agent", "wake"})


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
        validators=[MinValueValidator(1024), MaxValueValidator(16 * 1024 * 1024)],
        help_text="A larger body is refused with 413.",
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


class HookMapping(models.Model):
    """Turns one kind of request into a wake. The first enabled mapping that matches acts."""

    class Action(models.TextChoices):
        WAKE = "wake", "wake: an event for a session"

    class Mode(models.TextChoices):
        NOW = "now", "now"
        NEXT_HEARTBEAT = "next-heartbeat", "next-heartbeat: wait for the schedule"

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
    action = models.CharField(max_length=16, choices=Action.choices, default=Action.WAKE)
    mode = models.CharField(max_length=16, choices=Mode.choices, default=Mode.NOW)
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
        "Empty: no key, the wake fans out.",
    )
    text_template = models.TextField(
        help_text="The event's text, for example: {{payload.repository.name}}: {{payload.action}}",
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
        if errors:
            raise ValidationError(errors)

    def _check_fixed_session_key(self) -> None:
        snapshot = configuration.gateway()
        if self.agent_id is None or self.agent_id in snapshot.agents:
            dispatch.resolve_session(self.session_key, self.agent_id, snapshot)
