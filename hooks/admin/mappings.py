"""The mappings: which request becomes which wake."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Final
from urllib.parse import quote

from django.contrib import admin, messages
from django.contrib.admin.utils import unquote
from django.core.exceptions import PermissionDenied, ValidationError
from django.db import transaction
from django.db.models import Max, Q, QuerySet
from django.forms.models import model_to_dict
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect, QueryDict
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils import timezone
from django.utils.decorators import method_decorator
from django.utils.html import format_html
from django.views.decorators.http import require_POST

from hooks import presets, samples
from hooks.admin.mapping_form import (
    HMAC_FIELDS,
    TURN_FIELDS,
    MappingForm,
    new_secret,
    sender_makes_secret,
)
from hooks.checking import check
from hooks.configuration import MappingConfiguration, hooks
from hooks.models import HookMapping, SignatureScheme
from hooks.presets import PRESETS, Preset
from hooks.samples import SAMPLES, Sample
from wake import configuration
from wake.admin.screens import NOTHING, Page, badge, code, link_by_key, list_url
from wake.models import Agent
from wake.presentation import counted, first_line

# On a page that is only looked at there are no fields, and everything is shown.
_IS_TURN: Final = "($data.action ?? 'agent') == 'agent'"
_IS_SIGNED: Final = "($data.signature_scheme ?? 'hmac') != ''"
_IS_HMAC: Final = "($data.signature_scheme ?? 'hmac') == 'hmac'"

_ROW_ID: Final = re.compile(r"form-([0-9]{1,6})-id")
_NUMBER: Final = re.compile(r"[0-9]{1,18}")


def reordered(present: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """Return `present` with those of `wanted` in their order, in the places that they had. Pure.

    A list may show only some of the mappings: the others stay where they are.
    """
    known = set(present)
    moved = [key for key in dict.fromkeys(wanted) if key in known]
    places, following = set(moved), iter(moved)
    return [next(following) if key in places else key for key in present]


@admin.register(HookMapping)
class HookMappingAdmin(Page):
    form = MappingForm
    list_display = (
        "name",
        "enabled",
        "path",
        "signature",
        "does",
        "key",
        "agent_link",
        "position",
    )
    list_display_links = ("name",)
    list_filter = ("enabled", "action")
    search_fields = ("name", "match_path", "session_key")
    search_help_text = "Name, path or session key"
    ordering = ("position", "pk")
    # The list is shown in the order that counts, and in no other: it is dragged into shape.
    ordering_field = "position"
    list_editable = ("position",)
    hide_ordering_field = True
    sortable_by = ("position",)
    list_per_page = 200
    list_before_template = "admin/hooks/mapping_list_links.html"
    actions = ("enable", "disable", "move_first", "move_last", "make_secret", "drop_old_secret")
    save_as = True
    readonly_fields = ("secrets",)
    change_form_outer_before_template = "admin/hooks/mapping_head.html"
    change_form_after_template = "admin/hooks/mapping_check.html"
    fieldsets = (
        (None, {"fields": ("name", "enabled")}),
        (
            "Match",
            {
                "fields": ("match_path", "match_source"),
                "description": "The first enabled mapping that matches acts, in the order of the "
                "list.",
            },
        ),
        (
            "Signature",
            {
                "fields": (
                    "signature_scheme",
                    "secrets",
                    "signing_secret",
                    *HMAC_FIELDS,
                )
            },
        ),
        (
            "What it does",
            {
                "fields": ("action", "mode", "text_template", "transform", "for_each"),
                "description": "Templates are filled from the request: {{payload.a.b}}, "
                "{{messages[0].subject}}, {{headers.x-event}}, {{query.kind}}, {{path}}, {{now}}. "
                "What is missing renders empty; a text that renders empty is refused.",
            },
        ),
        (
            "Where it goes",
            {
                "fields": ("session_key", "agent"),
                "description": "A key that is a template is only used if the hook policy lets "
                "requests choose the session.",
            },
        ),
        ("Turn", {"fields": TURN_FIELDS, "classes": ("mapping-turn",)}),
    )
    conditional_fields: ClassVar = {
        "secrets": _IS_SIGNED,
        "signing_secret": _IS_SIGNED,
        **dict.fromkeys(HMAC_FIELDS, _IS_HMAC),
        **dict.fromkeys(TURN_FIELDS, _IS_TURN),
    }

    class Media:
        css = {"all": ("hooks/mapping.css",)}

    def get_urls(self) -> list[URLPattern]:
        own = (("presets/", self.presets_view), ("check/", self.check_view))
        return [
            path(
                where,
                self.admin_site.admin_view(view),
                name=f"hooks_hookmapping_{where.strip('/')}",
            )
            for where, view in own
        ] + super().get_urls()

    # --- The list and its order -----------------------------------------------------------------

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        # Django would save each position by itself, as if the list showed every mapping.
        if request.method == "POST" and "_save" in request.POST:
            return self._save_order(request)
        return super().changelist_view(request, extra_context)

    def _save_order(self, request: HttpRequest) -> HttpResponse:
        if not self.has_change_permission(request):
            raise PermissionDenied
        rows = []
        for name, key in request.POST.items():
            number = _ROW_ID.fullmatch(name)
            position = request.POST.get(f"form-{number[1]}-position", "") if number else ""
            if number and _NUMBER.fullmatch(position) and _NUMBER.fullmatch(str(key)):
                rows.append((int(position), int(number[1]), int(str(key))))
        self._put_in_order(request, [key for _, _, key in sorted(rows)])
        return HttpResponseRedirect(request.get_full_path())

    def _put_in_order(self, request: HttpRequest, wanted: Sequence[int]) -> None:
        """Give each mapping its place in the list as its position, those of `wanted` in theirs."""
        with transaction.atomic():
            present = list(
                HookMapping.objects.select_for_update()
                .only("name", "position")
                .order_by("position", "pk")
            )
            by_key = {mapping.pk: mapping for mapping in present}
            moved = []
            for position, key in enumerate(reordered(list(by_key), wanted)):
                if by_key[key].position != position:
                    by_key[key].position = position
                    moved.append(by_key[key])
            HookMapping.objects.bulk_update(moved, ["position"], batch_size=500)
            # A bulk update sends no signal.
            hooks.forget()
        self.record(request, moved, "Moved.")
        self.message_user(request, "The order is saved.", messages.SUCCESS)

    @admin.action(description="Move to the top", permissions=["operate"])
    def move_first(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        self._move(request, queryset, first=True)

    @admin.action(description="Move to the end", permissions=["operate"])
    def move_last(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        self._move(request, queryset, first=False)

    def _move(self, request: HttpRequest, queryset: QuerySet[Any], *, first: bool) -> None:
        chosen = set(queryset.values_list("pk", flat=True))
        present = HookMapping.objects.order_by("position", "pk").values_list("pk", flat=True)
        self._put_in_order(request, sorted(present, key=lambda key: (key in chosen) != first))

    def buttons_for(self, request: HttpRequest, row: HookMapping) -> tuple[str, ...]:
        buttons = ["disable" if row.enabled else "enable"]
        if row.signature_scheme and not _sender_makes_secret(row):
            buttons.append("make_secret")
        if row.previous_signing_secret:
            buttons.append("drop_old_secret")
        return tuple(buttons)

    @admin.action(description="Enable", permissions=["operate"])
    def enable(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        enabled = []
        for mapping in queryset.filter(enabled=False):
            mapping.enabled = True
            try:
                mapping.full_clean()
            except ValidationError as error:
                reasons = " ".join(error.messages)
                self.message_user(
                    request, f"{mapping.name} stays disabled: {reasons}", messages.ERROR
                )
                continue
            mapping.save(update_fields=["enabled"])
            enabled.append(mapping)
        self._say(request, enabled, "enabled")

    @admin.action(description="Disable", permissions=["operate"])
    def disable(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        disabled = list(queryset.filter(enabled=True))
        for mapping in disabled:
            mapping.enabled = False
            mapping.save(update_fields=["enabled"])
        self._say(request, disabled, "disabled")

    def _say(self, request: HttpRequest, mappings: list[HookMapping], done: str) -> None:
        self.record(request, mappings, f"{done.capitalize()}.")
        level = messages.SUCCESS if mappings else messages.INFO
        self.message_user(request, f"{counted(len(mappings), 'mapping')} {done}.", level)

    @admin.display(description="path", ordering="match_path")
    def path(self, row: HookMapping) -> str:
        path = code(row.match_path) if row.match_path else "every path"
        if not row.match_source:
            return path
        return format_html(
            '{}<span class="wake-beside">source is {}</span>', path, row.match_source
        )

    @admin.display(description="signature")
    def signature(self, row: HookMapping) -> str:
        if not row.signature_scheme:
            return NOTHING
        return badge(row.signature_scheme, "info", row.get_signature_scheme_display())

    @admin.display(description="does")
    def does(self, row: HookMapping) -> str:
        return f"{row.action}, {row.mode}"

    @admin.display(description="session key")
    def key(self, row: HookMapping) -> str:
        if row.session_key:
            return code(first_line(row.session_key, 80))
        return "none: fans out" if row.action == HookMapping.Action.WAKE else "the policy's default"

    @admin.display(description="agent")
    def agent_link(self, row: HookMapping) -> str:
        return link_by_key(Agent, row.agent_id, row.agent_id) if row.agent_id else "default"

    # --- The form -------------------------------------------------------------------------------

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        fieldsets = super().get_fieldsets(request, obj)
        if obj is None or self.has_change_permission(request, obj):
            return fieldsets
        # Who only looks would be shown what is stored.
        return [
            (
                title,
                {
                    **options,
                    "fields": [name for name in options["fields"] if name != "signing_secret"],
                },
            )
            for title, options in fieldsets
        ]

    def get_changeform_initial_data(self, request: HttpRequest) -> dict[str, Any]:
        preset = _preset(request)
        if preset is None:
            return dict(super().get_changeform_initial_data(request))
        names = set(HookMapping.objects.values_list("name", flat=True))
        return model_to_dict(presets.new_mapping(preset, taken_names=names))

    def render_change_form(
        self,
        request: HttpRequest,
        context: dict[str, Any],
        add: bool = False,
        change: bool = False,
        form_url: str = "",
        obj: Any = None,
    ) -> HttpResponse:
        preset = _preset(request) if add else None
        form = context["adminform"].form
        match_path = obj.match_path if obj else str(form["match_path"].value() or "")
        context["preset"] = preset
        context["address"] = _address(request, match_path) if obj or preset else ""
        if add or self.has_change_permission(request, obj):
            address = reverse("admin:hooks_hookmapping_check")
            context["check_address"] = f"{address}?mapping={obj.pk}" if obj else address
            context["samples"] = SAMPLES
            context["chosen_sample"] = preset.sample if preset else _likely_sample(match_path)
        return super().render_change_form(request, context, add, change, form_url, obj)

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        if not change:
            last = HookMapping.objects.aggregate(last=Max("position"))["last"]
            obj.position = 0 if last is None else last + 1
        obj.has_new_secret = form.made_secret
        super().save_model(request, obj, form, change)

    def response_add(
        self, request: HttpRequest, obj: Any, post_url_continue: str | None = None
    ) -> HttpResponse:
        if obj.has_new_secret:
            return self._show_secret(request, obj)
        return super().response_add(request, obj, post_url_continue)

    def response_change(self, request: HttpRequest, obj: Any) -> HttpResponse:
        if obj.has_new_secret:
            return self._show_secret(request, obj)
        return super().response_change(request, obj)

    # --- Secrets --------------------------------------------------------------------------------

    @admin.display(description="secrets")
    def secrets(self, row: HookMapping) -> str:
        # As it is stored: a form that is refused has changed the row that it shows.
        stored = HookMapping.objects.filter(pk=row.pk).first()
        if stored is None or not stored.signing_secret:
            return "None is set yet."
        if stored.previous_signing_secret:
            return "A secret is set; the previous one still works. Neither is ever shown again."
        return "A secret is set. It is never shown again."

    def _show_secret(self, request: HttpRequest, mapping: HookMapping) -> HttpResponse:
        preset = _preset(request)
        lines = [
            "Give it to the sender, as the secret of its webhook, with this URL:",
            _address(request, mapping.match_path),
        ]
        if preset:
            lines += ["", preset.how_to_send]
        if mapping.previous_signing_secret:
            lines += ["", "The previous secret works as well, until “Drop the old secret”."]
        return self.show_once(
            request,
            mapping,
            title=f"Signing secret of mapping {mapping.name}",
            secret=mapping.signing_secret,
            example="\n".join(lines),
        )

    @admin.action(description="New signing secret", permissions=["operate"])
    def make_secret(self, request: HttpRequest, queryset: QuerySet[Any]) -> HttpResponse | None:
        with transaction.atomic():
            chosen = list(queryset.select_for_update()[:2])
            if len(chosen) != 1:
                reason = "Choose one mapping: its new secret is shown once."
                self.message_user(request, reason, messages.ERROR)
                return None
            mapping: HookMapping = chosen[0]
            if not mapping.signature_scheme or _sender_makes_secret(mapping):
                reason = (
                    f"{mapping.name} takes no secret that is made here: its sender makes it."
                    if mapping.signature_scheme
                    else f"{mapping.name} has no signature scheme, so that it needs no secret."
                )
                self.message_user(request, reason, messages.ERROR)
                return None
            mapping.previous_signing_secret = mapping.signing_secret
            mapping.signing_secret = new_secret(mapping.signature_scheme)
            mapping.save(update_fields=["signing_secret", "previous_signing_secret"])
        self.record(request, [mapping], "New signing secret.")
        return self._show_secret(request, mapping)

    @admin.action(description="Drop the old secret", permissions=["operate"])
    def drop_old_secret(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        dropped = list(queryset.exclude(previous_signing_secret=""))
        for mapping in dropped:
            mapping.previous_signing_secret = ""
            mapping.save(update_fields=["previous_signing_secret"])
        self.record(request, dropped, "Dropped the old secret.")
        level = messages.SUCCESS if dropped else messages.INFO
        self.message_user(request, f"{counted(len(dropped), 'old secret')} dropped.", level)

    # --- Presets and the check ------------------------------------------------------------------

    def presets_view(self, request: HttpRequest) -> HttpResponse:
        """The presets to choose from. Each leads to the form, filled in."""
        if not self.has_add_permission(request):
            raise PermissionDenied
        context = {
            **self.admin_site.each_context(request),
            "title": "Add from preset",
            "opts": self.opts,
            "presets": PRESETS,
            "add_url": reverse("admin:hooks_hookmapping_add"),
            "list_url": list_url(HookMapping),
        }
        return TemplateResponse(request, "admin/hooks/mapping_presets.html", context)

    @method_decorator(require_POST)
    def check_view(self, request: HttpRequest) -> HttpResponse:
        """What there is to say about the values in the form, as a piece of HTML."""
        may = self.has_view_or_change_permission(request) or self.has_add_permission(request)
        if not may:
            raise PermissionDenied
        stored = self.get_object(request, unquote(request.GET.get("mapping", "")))
        found = check(
            _as_written(request.POST),
            hooks(),
            configuration.gateway(),
            now=timezone.now(),
            earlier=_earlier(stored),
            sample=_sample(request.POST.get("sample", "")),
        )
        return TemplateResponse(request, "admin/hooks/mapping_check_result.html", {"check": found})


def _preset(request: HttpRequest) -> Preset | None:
    try:
        return presets.find(request.GET.get("preset", ""))
    except KeyError:
        return None


def _sample(key: str) -> Sample | None:
    try:
        return samples.find(key)
    except KeyError:
        return None


def _likely_sample(match_path: str) -> str:
    """Return the sample of the preset whose path this is, or begins like; else none."""
    likely = (
        preset.sample for preset in PRESETS if match_path.startswith(preset.values["match_path"])
    )
    return next(likely, "")


def _address(request: HttpRequest, match_path: str) -> str:
    """Return the URL that senders post to; it ends in an ellipsis where every path will do."""
    base = request.build_absolute_uri(f"{hooks().base_path}/")
    return base + (quote(match_path.strip("/")) or "…")


def _sender_makes_secret(mapping: HookMapping) -> bool:
    return sender_makes_secret(mapping.signature_scheme, mapping.signature_header)


def _earlier(stored: HookMapping | None) -> list[MappingConfiguration]:
    """Return the enabled mappings that are asked before this one; before a new one, all."""
    if stored is None:
        return list(hooks().mappings)
    before = HookMapping.objects.filter(
        Q(position__lt=stored.position) | Q(position=stored.position, pk__lt=stored.pk)
    )
    keys = set(before.values_list("pk", flat=True))
    return [mapping for mapping in hooks().mappings if mapping.id in keys]


def _as_written(values: QueryDict) -> HookMapping:
    """Return the mapping that a form's values write, as far as the check looks at them.

    Secrets are none of them.
    """
    action, mode, scheme = (values.get(name, "") for name in ("action", "mode", "signature_scheme"))
    return HookMapping(
        name=values.get("name", ""),
        match_path=values.get("match_path", "").strip().strip("/"),
        match_source=values.get("match_source", "").strip(),
        signature_scheme=scheme if scheme in SignatureScheme else SignatureScheme.NONE,
        action=action if action in HookMapping.Action else HookMapping.Action.WAKE,
        mode=mode if mode in HookMapping.Mode else HookMapping.Mode.NOW,
        agent_id=values.get("agent") or None,
        session_key=values.get("session_key", "").strip(),
        for_each=values.get("for_each", "").strip(),
        transform=values.get("transform", ""),
        text_template=values.get("text_template", ""),
    )
