"""The simulator: a request is tried on a page, step by step, and nothing of it is done."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, cast
from urllib.parse import quote, urlencode
from uuid import UUID

from django import forms
from django.contrib import admin
from django.core.exceptions import PermissionDenied, ValidationError
from django.http import HttpRequest, HttpResponse, QueryDict
from django.template.loader import render_to_string
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils import timezone
from django.utils.safestring import SafeString

from hooks import configuration, credentials, curl, samples, trials
from hooks.configuration import HookConfiguration
from hooks.credentials import TOKEN_HEADER, Credential
from hooks.deliveries import NotReplayable, arrival_again
from hooks.mapping import on_path
from hooks.models import ENDPOINTS, HookDelivery, HookMapping, SignatureScheme
from hooks.presets import PRESETS, Preset
from hooks.simulation import Simulation, Trial, simulate
from wake import configuration as wake_configuration
from wake.admin.unfold_bases import (
    UnfoldAdminSelectWidget,
    UnfoldAdminTextareaWidget,
    UnfoldAdminTextInputWidget,
)

URL_NAME: Final = "hooks_simulator"

# A body that is larger is no text to edit in a page; it is simulated on its delivery's own page.
MAX_EDITED_BYTES: Final = 512 * 1024
# A longer body makes no line to copy.
MAX_COPIED_CHARACTERS: Final = 8_000
# Details from here on stand in a block of their own.
LONG_DETAIL: Final = 120

# What a client of HTTP writes itself, and what the command line shows in another way.
_NOT_COPIED: Final = frozenset(
    {
        *("accept-encoding", "connection", "content-length", "content-type", "expect", "host"),
        *("transfer-encoding", "authorization", TOKEN_HEADER),
    }
)
# A sender that is told by how it signs; HMAC is signed by many.
_OWN_SCHEMES: Final = frozenset(
    {SignatureScheme.GITHUB, SignatureScheme.STRIPE, SignatureScheme.SLACK}
)


def url(**query: str) -> str:
    """Return the simulator's address, with `path`, `sample`, `mapping` or `delivery` filled in."""
    address = reverse(f"admin:{URL_NAME}")
    return f"{address}?{urlencode(query)}" if query else address


def steps(simulation: Simulation) -> SafeString:
    """Return the steps of a simulation as a list, and the answer at their end."""
    lines = [
        (line, len(line.detail) > LONG_DETAIL or "\n" in line.detail) for line in simulation.lines
    ]
    return render_to_string("admin/hooks/simulator_steps.html", {"lines": lines})


def preset_of(mapping: HookMapping) -> Preset | None:
    """Return the preset that a mapping seems to be made of: by its signature, or by its path."""
    for preset in PRESETS:
        scheme = preset.values.get("signature_scheme")
        own_path = re.escape(str(preset.values["match_path"]))
        if scheme in _OWN_SCHEMES and scheme == mapping.signature_scheme:
            return preset
        if re.fullmatch(rf"{own_path}(-[0-9]+)?", mapping.match_path):
            return preset
    return None


class SampleForm(forms.Form):
    """The choice of a sample, in a form of its own: it fills the other one in."""

    sample = forms.ChoiceField(
        choices=[(sample.key, sample.title) for sample in samples.SAMPLES],
        widget=UnfoldAdminSelectWidget,
        help_text="What a service sends, for headers and payload below.",
    )


class SimulatorForm(forms.Form):
    """A request as a person writes it. `granted` are the credentials to choose from, by value."""

    path = forms.CharField(
        max_length=2000,
        widget=UnfoldAdminTextInputWidget(attrs={"list": "known-paths", "autocomplete": "off"}),
    )
    credential = forms.ChoiceField(required=False, widget=UnfoldAdminSelectWidget)
    headers = forms.CharField(
        required=False,
        widget=UnfoldAdminTextareaWidget(attrs={"rows": 4, "class": "wake-code"}),
        help_text="One to a line: Name: value.",
    )
    query = forms.CharField(
        required=False,
        widget=UnfoldAdminTextInputWidget(attrs={"autocomplete": "off"}),
        help_text="What follows the ? in the URL, for example kind=push&id=1.",
    )
    payload = forms.CharField(
        required=False,
        strip=False,
        widget=UnfoldAdminTextareaWidget(attrs={"rows": 12, "class": "wake-code"}),
        help_text="The body as it is sent.",
    )

    def __init__(
        self,
        hooks: HookConfiguration,
        granted: Mapping[str, Credential],
        data: QueryDict | None = None,
        initial: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(data, initial=dict(initial or {}))
        self._hooks = hooks
        taken = [(value, f"take for granted: {one.name}") for value, one in granted.items()]
        credential = cast("forms.ChoiceField", self.fields["credential"])
        credential.choices = [("", "look for it in the headers"), *taken]
        self.fields[
            "path"
        ].help_text = f"Below {hooks.base_path}/, for example wake or the path of a mapping."

    def clean_path(self) -> str:
        with _as_invalid():
            return trials.hook_path(self.cleaned_data["path"], self._hooks.base_path)

    def clean_headers(self) -> dict[str, str]:
        with _as_invalid():
            return trials.headers(self.cleaned_data["headers"].splitlines())

    def clean_query(self) -> dict[str, str]:
        return trials.query(self.cleaned_data["query"])

    def clean_payload(self) -> str:
        # A browser sends the ends of lines in another way than almost all else.
        return str(self.cleaned_data["payload"]).replace("\r\n", "\n")


@contextmanager
def _as_invalid() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValidationError(str(error)) from error


@dataclass(slots=True)
class _Start:
    """What the address asks for: values of the form, credentials to choose, and what to say."""

    granted: dict[str, Credential]
    initial: dict[str, str] = field(default_factory=dict)
    hints: list[str] = field(default_factory=list)


def simulator(request: HttpRequest) -> HttpResponse:
    """Show the form, filled as the address says; a POST shows what would happen as well."""
    if not may_simulate(request):
        raise PermissionDenied
    hooks, now = configuration.hooks(), timezone.now()
    start = _start(request, hooks, now)
    context: dict[str, Any] = {}
    if request.method != "POST":
        form = SimulatorForm(hooks, start.granted, initial=start.initial)
    else:
        form = SimulatorForm(hooks, start.granted, data=request.POST)
        if form.is_valid():
            trial = _trial(form.cleaned_data, start.granted)
            context = _result(request, trial, hooks, now)
    return TemplateResponse(
        request,
        "admin/hooks/simulator.html",
        {
            **admin.site.each_context(request),
            **context,
            "title": "Simulator",
            "form": form,
            "sample_form": SampleForm(initial=request.GET.dict()),
            "kept": {
                "path": form["path"].value() or "",
                **({"mapping": request.GET["mapping"]} if "mapping" in request.GET else {}),
            },
            "hints": start.hints,
            "known_paths": _known_paths(hooks),
            "start_again": url(),
        },
    )


def may_simulate(request: HttpRequest) -> bool:
    """Whether the user may try requests: those who may look at the hook policy."""
    return _may_view(request, "hookpolicy")


def _may_view(request: HttpRequest, model: str) -> bool:
    return any(request.user.has_perm(f"hooks.{verb}_{model}") for verb in ("view", "change"))


def _known_paths(hooks: HookConfiguration) -> list[str]:
    paths = (*sorted(ENDPOINTS), *(mapping.path for mapping in hooks.mappings if mapping.path))
    return list(dict.fromkeys(paths))


def _start(request: HttpRequest, hooks: HookConfiguration, now: datetime) -> _Start:
    asked = request.GET
    start = _Start(_granted(hooks, now), {"path": asked.get("path", "")})
    if not hooks.enabled:
        start.hints.append("Hooks are off in the hook policy: every request is answered with 404.")
    if "delivery" in asked:
        if not _may_view(request, "hookdelivery"):
            raise PermissionDenied
        _fill_from_delivery(start, asked["delivery"], now)
    elif "mapping" in asked:
        _fill_from_mapping(start, asked["mapping"])
    if "sample" in asked:
        _fill_from_sample(start, asked["sample"])
    return start


def _granted(hooks: HookConfiguration, now: datetime) -> dict[str, Credential]:
    """Return credentials to take for granted: the valid tokens, and one for each mapping alone."""
    of_tokens = [
        credentials.of_token(token) for token in hooks.tokens.values() if token.is_valid(now)
    ]
    of_mappings = [
        Credential(
            f'one for "{mapping.name}" only', f"mapping:{mapping.id}", frozenset({mapping.id})
        )
        for mapping in hooks.mappings
    ]
    return {credential.key: credential for credential in (*of_tokens, *of_mappings)}


def _fill_from_delivery(start: _Start, written_uid: str, now: datetime) -> None:
    try:
        delivery = HookDelivery.objects.get(uid=UUID(written_uid))
    except (ValueError, HookDelivery.DoesNotExist):
        start.hints.append("That delivery does not exist.")
        return
    start.initial["path"] = delivery.path
    try:
        arrival = arrival_again(delivery, now)
    except NotReplayable:
        start.hints.append("The body of that delivery was not kept: only its path is filled in.")
        return
    credential = arrival.credential
    start.granted[credential.key] = Credential(
        f"that of the delivery ({credential.name})", credential.key, credential.mappings
    )
    start.initial |= {
        "credential": credential.key,
        "headers": _as_lines(arrival.headers),
        "query": urlencode(arrival.query),
    }
    if len(arrival.body) > MAX_EDITED_BYTES:
        start.hints.append(
            f"The body has {len(arrival.body):,} bytes, too many to edit here: the delivery's own "
            "page says what it comes to today."
        )
        return
    start.initial["payload"] = arrival.body.decode("utf-8", "replace")
    if start.initial["payload"].encode() != arrival.body:
        start.hints.append(
            "The body is not UTF-8: what is no character is shown as \N{REPLACEMENT CHARACTER}."
        )


def _fill_from_mapping(start: _Start, written_id: str) -> None:
    is_number = written_id.isascii() and written_id.isdecimal() and len(written_id) < 19
    mapping = HookMapping.objects.filter(pk=int(written_id)).first() if is_number else None
    if mapping is None:
        start.hints.append("That mapping does not exist.")
        return
    # One without a path of its own answers at any.
    start.initial["path"] = mapping.match_path or start.initial["path"] or "example"
    value = f"mapping:{mapping.pk}"
    if value in start.granted:
        start.initial["credential"] = value
    else:
        start.hints.append(f"{mapping.name} is disabled: it answers nothing.")
    if preset := preset_of(mapping):
        _fill_from_sample(start, preset.sample)
    else:
        start.initial["payload"] = _readable(curl.example_payload(configuration.frozen(mapping)))


def _fill_from_sample(start: _Start, key: str) -> None:
    try:
        sample = samples.find(key)
    except KeyError:
        start.hints.append("That sample does not exist.")
        return
    start.initial |= {
        "headers": _as_lines(sample.headers),
        "payload": _readable(sample.payload),
    }
    if not start.initial.get("path"):
        paths = (one.values["match_path"] for one in PRESETS if one.sample == key)
        start.initial["path"] = str(next(paths, ""))


def _readable(payload: Any) -> str:
    return json.dumps(payload, indent=2, ensure_ascii=False)


def _as_lines(headers: Mapping[str, str]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in headers.items())


def _trial(cleaned: Mapping[str, Any], granted: Mapping[str, Credential]) -> Trial:
    return Trial(
        path=cleaned["path"],
        body=cleaned["payload"].encode(),
        headers=cleaned["headers"],
        query=cleaned["query"],
        credential=granted.get(cleaned["credential"]),
    )


def _result(
    request: HttpRequest, trial: Trial, hooks: HookConfiguration, now: datetime
) -> dict[str, Any]:
    """Return what the page shows of a trial."""
    simulation = simulate(trial, hooks, wake_configuration.gateway(), now=now)
    is_right = trial.credential is not None or any(
        line.title == "Credential" and line.verdict == "good" for line in simulation.lines
    )
    return {
        "steps": steps(simulation),
        "answer": trials.in_http(simulation.answer, hooks),
        "is_right": is_right,
        "curl": _curl(request, trial, hooks),
        "signed": [one.name for one in on_path(hooks.mappings, trial.path) if one.signature],
    }


def _curl(request: HttpRequest, trial: Trial, hooks: HookConfiguration) -> str:
    address = request.build_absolute_uri(f"{hooks.base_path}/{quote(trial.path)}")
    if trial.query:
        address = f"{address}?{urlencode(trial.query)}"
    headers = {name: text for name, text in trial.headers.items() if name not in _NOT_COPIED}
    body = trial.body.decode()
    return curl.line(address, body if len(body) <= MAX_COPIED_CHARACTERS else None, headers=headers)


def _urls() -> list[URLPattern]:
    address = "hooks/simulator/"
    return [path(address, admin.site.admin_view(simulator), name=URL_NAME)]


# Unfold asks its site for the addresses of pages that belong to no model.
cast("Any", admin.site).extra_urls = _urls
