"""Agents and the gateway's settings."""

from __future__ import annotations

import shlex
from datetime import time, timedelta
from typing import Any, ClassVar, Final

from django import forms
from django.conf import settings
from django.contrib import admin, messages
from django.contrib.admin.utils import unquote
from django.core.exceptions import ValidationError
from django.db import models
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import reverse
from django.utils import timezone
from django.utils.html import format_html

from wake import configuration
from wake.admin.screens import (
    NOTHING,
    OneRowPage,
    Page,
    badge,
    block,
    code,
)
from wake.admin.unfold_bases import (
    UnfoldAdminSelectWidget,
    UnfoldAdminTextInputWidget,
)
from wake.durations import format_duration, parse_duration
from wake.models import (
    RUNNERS_WITH_URL,
    Agent,
    GatewaySettings,
    RunnerKind,
)
from wake.presentation import counted, first_line
from wake.session_states import unreached_reason
from wake.signing import new_signing_secret
from wake.status import with_counts
from wake.targets import target


class DurationInput(forms.Field):
    """A duration written as on the command line: 30m, 1h30m, 0."""

    def prepare_value(self, value: Any) -> Any:
        return format_duration(value) if isinstance(value, timedelta) else value

    def to_python(self, value: Any) -> timedelta | None:
        if value in self.empty_values or isinstance(value, timedelta):
            return value or None
        try:
            return parse_duration(str(value))
        except ValueError as error:
            raise ValidationError(str(error)) from error


class ClockInput(forms.TimeField):
    """A time of day without seconds: 08:00; 24:00 is midnight."""

    def prepare_value(self, value: Any) -> Any:
        return f"{value:%H:%M}" if isinstance(value, time) else value

    def to_python(self, value: Any) -> time | None:
        if value == "24:00":
            return time(0)
        return super().to_python(value)


def _shown_for(*runners: RunnerKind) -> str:
    """Return the condition under which a field of these runners is on the form.

    Who may only look has no runner to choose, and is shown all; an error is never hidden.
    """
    chosen = " || ".join(f"runner == '{runner.value}'" for runner in runners)
    return f"$data.runner === undefined || {chosen} || $el.querySelector('.errorlist') !== null"


_OF_CHAT: Final = _shown_for(RunnerKind.CHAT)


@admin.register(Agent)
class AgentAdmin(Page):
    list_display = (
        "id",
        "name",
        "state",
        "runner",
        "target",
        "every",
        "queued_events",
        "dead_letters",
    )
    list_filter = ("runner", "enabled", "paused")
    search_fields = ("id", "name")
    ordering = ("id",)
    actions = ("pause", "resume", "make_signing_secret")
    # The command is nowhere among the form's fields: whoever can log in to a web page must not be
    # able to run programs.
    fieldsets = (
        (None, {"fields": ("id", "name", ("enabled", "paused"))}),
        (
            "How it is reached",
            {
                "fields": (
                    "runner",
                    "command_line",
                    "url",
                    "model",
                    "key_variable",
                    "transcript_bytes",
                )
            },
        ),
        (
            "Heartbeats",
            {
                "fields": (
                    "heartbeat_every",
                    ("active_from", "active_until"),
                    "time_zone",
                    "idle_runs",
                    "heartbeat_prompt",
                    ("timeout_seconds", "max_attempts"),
                )
            },
        ),
        (
            "Limits",
            {
                "fields": ("max_parallel_runs", "max_runs_per_minute", "max_self_wakes"),
                "description": "What they hold back stays queued; nothing is lost.",
            },
        ),
        ("Replies and signatures", {"fields": ("reply_url", "signing")}),
    )
    conditional_fields: ClassVar = {
        "command_line": _shown_for(RunnerKind.COMMAND),
        "url": _shown_for(*RUNNERS_WITH_URL),
        "model": _OF_CHAT,
        "key_variable": _shown_for(RunnerKind.CHAT, RunnerKind.OPENCLAW),
        "transcript_bytes": _OF_CHAT,
    }
    readonly_fields = ("command_line", "signing")
    formfield_overrides: ClassVar[Any] = {
        models.DurationField: {"form_class": DurationInput, "widget": UnfoldAdminTextInputWidget},
        models.TimeField: {"form_class": ClockInput, "widget": UnfoldAdminTextInputWidget},
    }

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        return with_counts(super().get_queryset(request), timezone.now())

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:
        return (*self.readonly_fields, *(["id"] if obj else []))

    def formfield_for_dbfield(
        self, db_field: models.Field[Any, Any], request: HttpRequest, **options: Any
    ) -> forms.Field | None:
        field = super().formfield_for_dbfield(db_field, request, **options)
        if field is not None and isinstance(field.label, str):
            field.label = field.label.replace("url", "URL").replace("Url", "URL")
        if db_field.name == "key_variable" and field is not None:
            names = [("", "none"), *((name, name) for name in settings.AGENT_KEY_VARIABLES)]
            field.widget = UnfoldAdminSelectWidget(choices=names)
        return field

    def get_actions(self, request: HttpRequest) -> dict[str, Any]:
        # Deleting in bulk would list every session of the agents as the reason why it cannot.
        actions = super().get_actions(request)
        actions.pop("delete_selected", None)
        return actions

    def buttons_for(self, request: HttpRequest, row: Agent) -> tuple[str, ...]:
        buttons = ("resume",) if row.paused else ("pause",)
        is_signed = row.runner == RunnerKind.HTTP or row.reply_url
        return (*buttons, "make_signing_secret") if is_signed else buttons

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        obj.has_new_secret = obj.needs_secret
        if obj.has_new_secret:
            obj.signing_secret = new_signing_secret()
        super().save_model(request, obj, form, change)

    def response_add(
        self, request: HttpRequest, obj: Any, post_url_continue: str | None = None
    ) -> HttpResponse:
        if obj.has_new_secret:
            return self._show_signing_secret(request, obj)
        return super().response_add(request, obj, post_url_continue)

    def response_change(self, request: HttpRequest, obj: Any) -> HttpResponse:
        if obj.has_new_secret:
            return self._show_signing_secret(request, obj)
        return super().response_change(request, obj)

    def _show_signing_secret(self, request: HttpRequest, agent: Agent) -> HttpResponse:
        return self.show_once(
            request,
            agent,
            title=f"Signing secret of agent {agent.pk}",
            secret=agent.signing_secret,
            example="What is posted to the agent's URL and to its reply URL is signed with it "
            "(Standard Webhooks).",
        )

    def delete_view(
        self, request: HttpRequest, object_id: str, extra_context: Any = None
    ) -> HttpResponse:
        agent: Agent | None = self.get_object(request, unquote(object_id))
        if agent and self.has_delete_permission(request, agent):
            reason = self._reason_to_keep(agent)
            if reason:
                self.message_user(request, reason, messages.ERROR)
                return HttpResponseRedirect(reverse("admin:wake_agent_change", args=[object_id]))
        return super().delete_view(request, object_id, extra_context)

    @staticmethod
    def _reason_to_keep(agent: Agent) -> str | None:
        if GatewaySettings.objects.filter(default_agent=agent).exists():
            return (
                f"{agent.pk} is the default agent and cannot be deleted: choose another one in "
                "the gateway settings first."
            )
        if count := agent.sessions.count():
            return (
                f"Agent {agent.pk} has {counted(count, 'session')}, whose history would be lost, "
                "and cannot be deleted. Disable it instead: wakes for it are then refused by name."
            )
        return None

    @admin.action(description="Pause", permissions=["operate"])
    def pause(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        self._set_paused(request, queryset, True)

    @admin.action(description="Resume", permissions=["operate"])
    def resume(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        self._set_paused(request, queryset, False)

    def _set_paused(self, request: HttpRequest, queryset: QuerySet[Any], paused: bool) -> None:
        agents = list(queryset.filter(paused=not paused))
        for agent in agents:
            agent.paused = paused
            # Saved one by one: the signal makes this process forget its snapshot at once.
            agent.save(update_fields=["paused"])
        done = "paused" if paused else "resumed"
        self.record(request, agents, f"{done.capitalize()}.")
        self.message_user(request, f"{counted(len(agents), 'agent')} {done}.", messages.SUCCESS)

    @admin.action(description="New signing secret", permissions=["operate"])
    def make_signing_secret(
        self, request: HttpRequest, queryset: QuerySet[Any]
    ) -> HttpResponse | None:
        agents = list(queryset[:2])
        if len(agents) != 1:
            self.message_user(
                request, "Choose one agent: its new secret is shown once.", messages.ERROR
            )
            return None
        agent: Agent = agents[0]
        agent.signing_secret = new_signing_secret()
        agent.save(update_fields=["signing_secret"])
        self.record(request, [agent], "New signing secret.")
        return self._show_signing_secret(request, agent)

    @admin.display(description="state")
    def state(self, row: Agent) -> str:
        snapshot = configuration.gateway()
        is_default = snapshot.default_agent == row.pk
        default = badge("default", "primary", "Meant where a request selects no agent.")
        if not row.enabled:
            label = badge("disabled", "danger", "Wakes for it are refused.")
        elif row.paused:
            label = badge("paused", "warning", "Its events wait.")
        elif row.runner == RunnerKind.NONE:
            label = badge("no runner", "warning", "Its events wait.")
        elif unreached := unreached_reason(row.pk, snapshot):
            label = badge("not reached", "warning", f"Its events wait: {unreached}.")
        else:
            label = badge("runs", "success")
        return format_html("{} {}", label, default) if is_default else label

    @admin.display(description="target")
    def target(self, row: Agent) -> str:
        shown = first_line(target(row), 80)
        return format_html('<span class="wake-code">{}</span>', shown) if shown else NOTHING

    @admin.display(description="every", ordering="heartbeat_every")
    def every(self, row: Agent) -> str:
        return format_duration(row.heartbeat_every) if row.heartbeat_every else "off"

    @admin.display(description="queued")
    def queued_events(self, row: Any) -> str:
        return f"{row.queued:,}"

    @admin.display(description="dead")
    def dead_letters(self, row: Any) -> str:
        return badge(f"{row.dead:,}", "danger") if row.dead else "0"

    @admin.display(description="command")
    def command_line(self, row: Agent) -> str:
        return format_html(
            '{}<p class="wake-note">Set on the command line only, so that nobody can run programs '
            "through a web page: {}</p>",
            block(shlex.join(row.command)) if row.command else NOTHING,
            code(f"manage.py agents set {row.pk or 'ID'} --runner command -- PROGRAM ARGS…"),
        )

    @admin.display(description="signing secret")
    def signing(self, row: Agent) -> str:
        if row.signing_secret:
            return "A secret is set. It is never shown again; “New signing secret” replaces it."
        return (
            "None is set. One is made, and shown once, when an agent is saved whose heartbeats or "
            "replies are posted to a URL."
        )


@admin.register(GatewaySettings)
class GatewaySettingsAdmin(OneRowPage):
    fieldsets = (
        (None, {"fields": ("heartbeats_enabled", "default_agent")}),
        (
            "Session keys",
            {
                "fields": (("scope", "main_key"),),
                "description": "A change leads later wakes to other sessions. Those that exist "
                "stay as they are, and deliver what is queued in them.",
            },
        ),
        ("Limits", {"fields": (("max_parallel_heartbeats", "max_queued_events"),)}),
    )

    def ensure_row(self) -> GatewaySettings:
        return GatewaySettings.ensure()
