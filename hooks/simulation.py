"""The simulator: what would happen to a request, step by step, and nothing of it done.

The steps are those of the real path (`hooks.decisions.decide`, `wake.dispatch.plan`); here they are
only put into words. Pure, apart from what a transform does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal
from uuid import UUID, uuid4

from hooks import answers, credentials, idempotency, mapping, policy
from hooks.answers import Answer
from hooks.bodies import decode_json
from hooks.configuration import HookConfiguration, MappingConfiguration
from hooks.credentials import Credential
from hooks.decisions import (
    Allowed,
    Asked,
    Item,
    Located,
    Matched,
    Step,
    Transformed,
    decide,
    require_hook,
)
from hooks.errors import BodyTooLarge, UnknownHook
from hooks.template import HookRequest
from wake.configuration import GatewayConfiguration
from wake.dispatch import Receipt, WakeRequest, plan
from wake.errors import WakeError

Verdict = Literal["good", "bad", "plain"]

# So many of the items of an array are told one by one.
SHOWN_ITEMS: Final = 10
_NO_EVENT: Final = UUID(int=0)


@dataclass(frozen=True, slots=True)
class Line:
    """One step: what it is about, how it went, and in which words. `detail` may be long."""

    title: str
    detail: str
    verdict: Verdict = "plain"


@dataclass(frozen=True, slots=True)
class Trial:
    """A request to try. `headers` are by lower-case name.

    With a `credential` that one is taken for granted; without one it is looked for in the headers.
    """

    path: str
    body: bytes
    headers: Mapping[str, str]
    query: Mapping[str, str]
    credential: Credential | None = None


@dataclass(frozen=True, slots=True)
class Simulation:
    """The steps in order, and the answer that the sender would get.

    `eventId` and `runId` in the answer are zero: nothing was stored that could have one.
    """

    lines: tuple[Line, ...]
    answer: Answer


def simulate(
    trial: Trial,
    hooks: HookConfiguration,
    gateway: GatewayConfiguration,
    *,
    now: datetime,
) -> Simulation:
    """Return what would happen to the request under this configuration. Never raises WakeError."""
    teller = _Teller(hooks, trial)
    try:
        answer = _walk(trial, teller, hooks, gateway, now)
    except WakeError as error:
        answer = answers.of_error(error)
    teller.all_items()
    teller.tell("Answer", _in_words(answer), "bad" if answer.error else "good")
    return Simulation(tuple(teller.lines), answer)


def _walk(
    trial: Trial,
    teller: _Teller,
    hooks: HookConfiguration,
    gateway: GatewayConfiguration,
    now: datetime,
) -> Answer:
    if not hooks.enabled:
        raise UnknownHook("hooks are off in the hook policy")
    credentials.refuse_in_query(trial.query)
    require_hook(trial.path, hooks)
    credential = teller.credential(now)
    if len(trial.body) > hooks.max_body_bytes:
        raise BodyTooLarge(hooks.max_body_bytes)
    payload = decode_json(trial.body)
    teller.tell("Body", f"{len(trial.body):,} bytes of JSON", "good")
    if key := idempotency.key_of(trial.headers, payload, credential.scheme):
        teller.tell("Idempotency key", f"{key}: the same again within 24 hours is not stored twice")
    request = HookRequest(
        path=trial.path,
        payload=payload,
        now=now,
        uid=uuid4(),
        all_headers=trial.headers,
        query=trial.query,
        hidden=hooks.signature_headers,
    )
    teller.mappings(request, credential)
    decision = decide(request, credential, hooks, gateway, watch=teller.step)
    if not decision.wakes:
        return answers.of_nothing(decision)
    receipts = [teller.planned(wake, gateway, now) for wake in decision.wakes]
    return answers.of_receipts(decision, receipts)


class _Teller:
    """Puts steps into words."""

    def __init__(self, hooks: HookConfiguration, trial: Trial) -> None:
        self.lines: list[Line] = []
        self._hooks = hooks
        self._trial = trial
        self._item = ""
        self._silent = False
        self._planned = 0
        self.tell("Request", f"POST {hooks.base_path}/{trial.path}")

    def tell(self, title: str, detail: str, verdict: Verdict = "plain") -> None:
        if not self._silent:
            self.lines.append(Line(f"{title}{self._item}", detail, verdict))

    def all_items(self) -> None:
        """Tell of the whole request again."""
        self._item, self._silent = "", False

    def credential(self, now: datetime) -> Credential:
        """Return the credential that the request shows; where it shows none, one for everything."""
        trial = self._trial
        if trial.credential:
            self.tell("Credential", f"taken for granted: {trial.credential.name}")
            return trial.credential
        on_path = mapping.on_path(self._hooks.mappings, trial.path)
        found = credentials.find(
            self._hooks, trial.path, on_path, trial.headers, lambda: trial.body, now
        )
        if found:
            self.tell("Credential", f"right: {found.name}", "good")
            return found
        schemes = [f'the signature of "{one.name}"' for one in on_path if one.signature]
        needed = " or ".join(["a hook token", *schemes])
        if any(True for _ in credentials.shown_tokens(trial.headers)):
            detail = "the token is wrong, expired or revoked: this is answered with 401"
            self.tell("Credential", f"{detail}. The rest as if it were right.", "bad")
        else:
            self.tell("Credential", f"none shown. A sender needs {needed}. The rest as if it had.")
        return Credential("any", "any")

    def mappings(self, request: HookRequest, credential: Credential) -> None:
        """Tell which mappings are passed over before one answers, and why."""
        for candidate in self._hooks.mappings:
            reason = mapping.why_not(candidate, request.path, request.payload, credential)
            if reason is None:
                return
            self.tell(f'Mapping "{candidate.name}"', f"passed over: {reason}")

    def step(self, step: Step) -> None:
        """Tell one step of the decision."""
        match step:
            case Matched(matching):
                self._matched(matching)
            case Item(index, count):
                self._item = f" (item {index + 1} of {count})"
                self._silent = index >= SHOWN_ITEMS
            case Transformed(None):
                self.tell("Transform", "wants nothing done")
            case Transformed(fields):
                self.tell("Transform", f"sets {_json(fields)}", "good")
            case Asked(wake, origin):
                self._asked(wake, origin)
            case Located(agent_id, session_key):
                where = (
                    f"{session_key}" if session_key else "none: the event goes to a main session"
                )
                self.tell("Session, canonical", f"{where} (agent {agent_id})", "good")
            case Allowed():
                self.tell("Policy", "allowed", "good")

    def _matched(self, matching: MappingConfiguration | None) -> None:
        if matching is None:
            self.tell("Endpoint", f"{self._hooks.base_path}/{self._trial.path}", "good")
            return
        self.tell(f'Mapping "{matching.name}"', f"answers, action {matching.action}", "good")

    def _asked(self, wake: WakeRequest, origin: policy.KeyOrigin) -> None:
        self.tell("Text", wake.text, "good" if wake.text.strip() else "bad")
        if wake.session_key is None:
            self.tell("Session key", "none")
        else:
            self.tell("Session key, as written", f"{wake.session_key} ({origin.value})")

    def planned(self, wake: WakeRequest, gateway: GatewayConfiguration, now: datetime) -> Receipt:
        """Tell when a wake would be delivered, and return the receipt it would get."""
        entry = plan(wake, gateway, now)
        self._item = f" ({self._planned + 1})" if self._planned else ""
        self._silent = self._planned >= SHOWN_ITEMS
        self._planned += 1
        when = "at once" if entry.due.at <= now else f"at its schedule, {entry.due.at:%H:%M:%S} UTC"
        kind = "a turn of its own" if wake.turn else "an event"
        nudged = len({key.agent_id for key in entry.nudged} - {entry.session.agent_id})
        others = f"; {nudged} other agents are nudged" if nudged else ""
        self.tell("Outcome", f"{kind} for {entry.session.key}, delivered {when}{others}", "good")
        return Receipt(wake.mode, "queued", entry.session.key, _NO_EVENT)


def _in_words(answer: Answer) -> str:
    if answer.text:
        return f"{answer.status}: {answer.text}"
    if answer.body is None:
        return f"{answer.status}: nothing to do"
    return f"{answer.status}: {answer.error or 'a receipt'}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
