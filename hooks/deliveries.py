"""From a request that passed the credential to its answer, and the record of both.

What is accepted is stored in one transaction: the events, the idempotency key and the record, so
that recording costs no commit of its own. What is refused is recorded after it was answered.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from django.db import DatabaseError, transaction
from uuid_utils.compat import uuid7

from hooks import answers, idempotency, throttling
from hooks.answers import Answer
from hooks.bodies import decode_json
from hooks.configuration import HookConfiguration, hooks
from hooks.credentials import Credential
from hooks.decisions import Decision, Matched, Step, decide, require_hook
from hooks.errors import NotAuthorized
from hooks.models import DeliveryOutcome, HookDelivery, KeepBodies
from hooks.template import HookRequest, carries_credential, visible_headers
from wake import configuration, metrics
from wake.configuration import GatewayConfiguration
from wake.dispatch import Receipt, WakeRequest, dispatch_batch
from wake.errors import StorageUnavailable, WakeError

DOOR: Final = "hook"
_FAILURES: Final = (DeliveryOutcome.REFUSED, DeliveryOutcome.FAILED)

logger = logging.getLogger(__name__)


class NotReplayable(WakeError):
    """A delivery whose body was not kept cannot be sent again."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request as it came, its credential right.

    `headers` are all of them, by lower-case name; `client` is the sender's address; `fault` is why
    the body could not be taken; `replay_of` is the delivery that is sent again, by primary key.
    """

    path: str
    body: bytes
    headers: dict[str, str]
    query: dict[str, str]
    credential: Credential
    client: str
    received_at: datetime
    fault: WakeError | None = None
    replay_of: int | None = None
    uid: UUID = field(default_factory=uuid7)
    began: float = field(default_factory=time.monotonic)

    def request(self, payload: Any, snapshot: HookConfiguration) -> HookRequest:
        """Return what decisions see of it, with its body decoded."""
        return HookRequest(
            path=self.path,
            payload=payload,
            now=self.received_at,
            uid=self.uid,
            headers=visible_headers(self.headers, snapshot.signature_headers),
            query=self.query,
        )


def take(arrival: Arrival) -> tuple[Answer, HookDelivery]:
    """Decide about a request, store what it asks for, and return the answer and the record of it.

    The record is stored with what was accepted; of what was refused it is not stored yet
    (`record`). Raises NotAuthorized alone: what the credential does not open leaves no record.
    """
    snapshot, gateway = hooks(), configuration.gateway()
    draft = HookDelivery(
        uid=arrival.uid,
        received_at=arrival.received_at,
        client=arrival.client,
        credential=arrival.credential.name[:150],
        credential_mappings=(
            None if arrival.credential.mappings is None else sorted(arrival.credential.mappings)
        ),
        path=_storable(arrival.path)[:500],
        replay_of_id=arrival.replay_of,
    )
    try:
        answer = _answer(arrival, draft, snapshot, gateway)
    except NotAuthorized:
        raise
    except WakeError as error:
        answer = answers.of_error(error)
    if draft.pk is None:
        _complete(draft, answer, arrival, snapshot)
    return answer, draft


def _answer(
    arrival: Arrival,
    draft: HookDelivery,
    snapshot: HookConfiguration,
    gateway: GatewayConfiguration,
) -> Answer:
    def watch(step: Step) -> None:
        if isinstance(step, Matched) and step.mapping:
            draft.mapping_id, draft.mapping_name = step.mapping.id, step.mapping.name

    with _refusals_counted():
        require_hook(arrival.path, snapshot)
        if arrival.fault:
            raise arrival.fault
        payload = decode_json(arrival.body)
        digest = None
        # A person who sends a delivery again wants it done again.
        if arrival.replay_of is None and (
            key := idempotency.key_of(arrival.headers, payload, arrival.credential.scheme)
        ):
            draft.idempotency_key = _storable(key)[:200]
            # No path is signed: under another one, a signed request is still the same.
            is_signed = arrival.credential.scheme in idempotency.WITH_SIGNED_ID
            path = "" if is_signed else arrival.path
            digest = idempotency.digest_of(arrival.credential.key, path, key)
        request = arrival.request(payload, snapshot)
        try:
            decision = decide(request, arrival.credential, snapshot, gateway, watch=watch)
        except NotAuthorized:
            raise
        except WakeError:
            # What was accepted once is not refused when it comes again, whatever was changed since.
            if digest and (first := _first_answer(digest, arrival.received_at)):
                metrics.note_wake(DOOR, "replayed", _wakes_in(first))
                return answers.of_replay(first)
            raise
    if not decision.wakes:
        return answers.of_nothing(decision)
    try:
        return _store(arrival, decision, digest, draft, snapshot)
    except DatabaseError as error:
        metrics.note_wake(DOOR, "failed")
        raise StorageUnavailable("the event could not be stored now; try again") from error


@contextlib.contextmanager
def _refusals_counted() -> Iterator[None]:
    """Count what is refused in here; what `dispatch` refuses, it counts itself."""
    try:
        yield
    except NotAuthorized:
        raise  # as every wrong credential is: by the view
    except WakeError as error:
        metrics.note_wake(DOOR, "failed" if answers.of_error(error).status >= 500 else "refused")
        raise


def _wakes_in(first: dict[str, Any]) -> int:
    """Return how many wakes the first answer to an idempotency key stands for."""
    return len(first.get("results", [first]))


def _store(
    arrival: Arrival,
    decision: Decision,
    digest: str | None,
    draft: HookDelivery,
    snapshot: HookConfiguration,
) -> Answer:
    """Store all of it or nothing, in one transaction.

    1. Claim the idempotency key; a request that came before has the answer.
    2. Store the events. One that is refused (its session is full) undoes the others.
    3. Keep the answer under the key, record the delivery, clear the client's failed credentials.
    """
    replayed = metrics.Counts()
    try:
        with transaction.atomic():
            first = idempotency.claim(digest, arrival.received_at) if digest else None
            if first is not None:
                answer = answers.of_replay(first)
                replayed.wake(DOOR, "replayed", _wakes_in(first))
            else:
                answer = answers.of_receipts(decision, _dispatch_all(decision.wakes))
                if digest:
                    idempotency.keep(digest, dict(answer.body or {}))
            _complete(draft, answer, arrival, snapshot)
            draft.save(force_insert=True)
            _clear_failures(draft)
            replayed.write()
    except (WakeError, DatabaseError):
        draft.pk = None  # whatever was stored is undone
        draft._state.adding = True
        raise
    return answer


def _dispatch_all(wakes: tuple[WakeRequest, ...]) -> list[Receipt]:
    receipts: list[Receipt] = []
    for result in dispatch_batch(wakes):
        if isinstance(result, WakeError):
            raise result
        receipts.append(result)
    return receipts


def _first_answer(digest: str, now: datetime) -> dict[str, Any] | None:
    try:
        return idempotency.find(digest, now)
    except DatabaseError:
        return None


def _complete(
    draft: HookDelivery, answer: Answer, arrival: Arrival, snapshot: HookConfiguration
) -> None:
    draft.milliseconds = round((time.monotonic() - arrival.began) * 1000, 3)
    draft.status = answer.status
    draft.outcome = answer.outcome
    draft.error = _storable(answer.error)
    draft.answer = None if answer.error or answer.body is None else dict(answer.body)
    kept = snapshot.keep_bodies == KeepBodies.ALWAYS or (
        snapshot.keep_bodies == KeepBodies.FAILURES and answer.outcome in _FAILURES
    )
    if kept and arrival.fault is None:
        draft.has_body = True
        draft.body = arrival.body
        visible = visible_headers(arrival.headers, snapshot.signature_headers)
        draft.headers = _storable_all(visible)
        draft.query = _storable_all(
            {name: value for name, value in arrival.query.items() if not carries_credential(name)}
        )


def record(delivery: HookDelivery) -> None:
    """Store the record of a request that was not accepted. Failing to do so is only logged."""
    try:
        with transaction.atomic():
            delivery.save(force_insert=True)
            _clear_failures(delivery)
    except DatabaseError as error:
        logger.warning("hooks: delivery %s is not recorded: %s", delivery.uid, error)


def _clear_failures(delivery: HookDelivery) -> None:
    # A replay is a person's; its client has shown nothing.
    if delivery.replay_of_id is None:
        throttling.clear(delivery.client)


def arrival_again(delivery: HookDelivery, now: datetime) -> Arrival:
    """Return a recorded delivery as if it came again now, with the credential it had.

    Raises NotReplayable when its body was not kept.
    """
    if not delivery.has_body or delivery.body is None:
        raise NotReplayable("its body was not kept")
    opened = delivery.credential_mappings
    return Arrival(
        path=delivery.path,
        body=bytes(delivery.body),
        headers=dict(delivery.headers),
        query=dict(delivery.query),
        credential=Credential(
            delivery.credential,
            f"delivery:{delivery.uid}",
            None if opened is None else frozenset(opened),
        ),
        client=delivery.client,
        received_at=now,
        replay_of=delivery.pk,
    )


def replay(delivery: HookDelivery, now: datetime) -> HookDelivery:
    """Take a recorded delivery through today's configuration, and return the record of that.

    Raises NotReplayable, and NotAuthorized when today's mapping is not open to its credential.
    """
    _, made = take(arrival_again(delivery, now))
    if made.pk is None:
        record(made)
    return made


def _storable(text: str) -> str:
    """Return a text without what PostgreSQL stores in none: NUL, and halves of characters."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def _storable_all(values: dict[str, str]) -> dict[str, str]:
    return {_storable(name): _storable(value) for name, value in values.items()}
