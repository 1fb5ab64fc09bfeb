"""From a request that passed the credential to its answer, and the record of both.

What is accepted is stored in one transaction: the events, the idempotency key and the record, so
that recording costs no commit of its own. What is refused is recorded after it was answered.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import groupby
from typing import Any, Final
from uuid import UUID

import msgspec
from django.db import DatabaseError, DataError, IntegrityError, transaction
from uuid_utils.compat import uuid7

from hooks import answers, idempotency, throttling
from hooks.answers import Answer
from hooks.bodies import decode_json
from hooks.configuration import HookConfiguration, hooks
from hooks.credentials import Credential
from hooks.decisions import Decision, Matched, Step, decide, require_hook
from hooks.errors import NotAuthorized
from hooks.models import ENDPOINTS, DeliveryOutcome, HookDelivery, KeepBodies
from hooks.template import HookRequest, carries_credential, visible_headers
from wake import columns, configuration, metrics
from wake.configuration import GatewayConfiguration
from wake.dispatch import Receipt, WakeRequest, dispatch_batch
from wake.errors import StorageUnavailable, WakeError

DOOR: Final = "hook"

_FAILURES: Final = (DeliveryOutcome.REFUSED, DeliveryOutcome.FAILED)

logger = logging.getLogger(__name__)


class NotReplayable(WakeError):
    """A delivery whose body was not kept cannot be sent again."""


class Arrival(msgspec.Struct, frozen=True):
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
    uid: UUID = msgspec.field(default_factory=uuid7)
    began: float = msgspec.field(default_factory=time.monotonic)

    def request(self, payload: Any, snapshot: HookConfiguration) -> HookRequest:
        """Return what decisions see of it, with its body decoded."""
        return HookRequest(
            path=self.path,
            payload=payload,
            now=self.received_at,
            uid=self.uid,
            all_headers=self.headers,
            query=self.query,
            hidden=snapshot.signature_headers,
        )


class Draft(msgspec.Struct):
    """The record of a request while it is made; the fields are those of HookDelivery."""

    uid: UUID
    received_at: datetime
    client: str
    credential: str
    credential_mappings: list[int] | None
    path: str
    replay_of_id: int | None
    mapping_id: int | None = None
    mapping_name: str = ""
    idempotency_key: str = ""
    milliseconds: float = 0.0
    status: int = 0
    outcome: DeliveryOutcome = DeliveryOutcome.FAILED
    error: str = ""
    answer: Mapping[str, Any] | None = None
    has_body: bool = False
    body: bytes | None = None
    headers: dict[str, str] = msgspec.field(default_factory=dict)
    query: dict[str, str] = msgspec.field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether all fields are as `_PLAIN` has them."""
        return not (
            self.mapping_name
            or self.error
            or self.idempotency_key
            or self.has_body
            or self.replay_of_id is not None
            or self.credential_mappings is not None
            or self.mapping_id is not None
        )


class Accepted(msgspec.Struct, frozen=True):
    """A request that is to be stored: what it asks for, and the record of it.

    `digest` stands for its idempotency key, if it has one.
    """

    arrival: Arrival
    draft: Draft
    decision: Decision
    digest: str | None
    snapshot: HookConfiguration


class Settled(msgspec.Struct, frozen=True):
    """A request with its answer. What was accepted is recorded already (`is_recorded`)."""

    answer: Answer
    draft: Draft
    is_recorded: bool


def take(arrival: Arrival) -> Settled:
    """Decide about a request, store what it asks for, and return the answer.

    The record is stored with what was accepted; of what was refused it is not stored yet
    (`record`). Raises NotAuthorized alone: what the credential does not open leaves no record.
    """
    begun = begin(arrival)
    if isinstance(begun, Accepted):
        return store([begun])[0]
    if outcome := _COUNTED_AS.get(begun.draft.outcome):
        metrics.note_wake(DOOR, outcome, _wakes_in(begun.draft.answer or {}))
    return begun


def take_accepted(arrivals: Sequence[Arrival]) -> list[Settled | None]:
    """Take requests together, as far as they are accepted; None stands for each that is not.

    Of that nothing is stored, recorded or counted: `take` it alone to learn what it comes to.
    Called on a thread that does nothing else.
    """
    columns.find_by_index()
    begun = [_begin_accepted(arrival) for arrival in arrivals]
    settled = iter(store([accepted for accepted in begun if accepted]))
    return [next(settled) if accepted else None for accepted in begun]


def _begin_accepted(arrival: Arrival) -> Accepted | None:
    try:
        begun = begin(arrival)
    except Exception:  # whatever it is, who takes it alone finds it too, and answers it
        return None
    return begun if isinstance(begun, Accepted) else None


# What becomes of a request that is not stored; what `dispatch` refuses, it counts itself.
_COUNTED_AS: Final = {
    DeliveryOutcome.REFUSED: "refused",
    DeliveryOutcome.FAILED: "failed",
    DeliveryOutcome.REPLAYED: "replayed",
}


def _wakes_in(answer: Mapping[str, Any]) -> int:
    """Return how many wakes an answer stands for."""
    return len(answer.get("results", [answer]))


def begin(arrival: Arrival) -> Accepted | Settled:
    """Decide about a request. Nothing is stored; of what is to be, nothing is read.

    A refused request is looked up under its idempotency key: it may have been accepted once.
    Raises NotAuthorized alone.
    """
    snapshot, gateway = hooks(), configuration.gateway()
    draft = Draft(
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
        accepted = _decide(arrival, draft, snapshot, gateway)
    except NotAuthorized:
        raise
    except WakeError as error:
        answer = answers.of_error(error)
    else:
        if isinstance(accepted, Accepted):
            return accepted
        answer = accepted
    _complete(draft, answer, arrival, snapshot)
    return Settled(answer, draft, is_recorded=False)


def _decide(
    arrival: Arrival,
    draft: Draft,
    snapshot: HookConfiguration,
    gateway: GatewayConfiguration,
) -> Accepted | Answer:
    require_hook(arrival.path, snapshot)
    if arrival.fault:
        raise arrival.fault
    payload = decode_json(arrival.body)

    def watch(step: Step) -> None:
        if isinstance(step, Matched) and step.mapping:
            draft.mapping_id, draft.mapping_name = step.mapping.id, step.mapping.name

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
    try:
        decision = decide(
            arrival.request(payload, snapshot),
            arrival.credential,
            snapshot,
            gateway,
            watch=None if arrival.path in ENDPOINTS else watch,  # those have no mapping
        )
    except NotAuthorized:
        raise
    except WakeError:
        # What was accepted once is not refused when it comes again, whatever was changed since.
        if digest and (first := _first_answer(digest, arrival.received_at)):
            return answers.of_replay(first)
        raise
    if not decision.wakes:
        return answers.of_nothing(decision)
    return Accepted(arrival, draft, decision, digest, snapshot)


def store(batch: Sequence[Accepted]) -> list[Settled]:
    """Store what requests ask for, each of them whole or not at all; return them settled.

    They are stored in their order. Neighbours that are one wake each and have no idempotency key
    share a transaction; the others have one each. Raises nothing: what could not be stored is
    answered so, and not recorded yet. What follows it is not tried: a database that is locked
    takes its time to say so, and would take it for each.
    """
    settled: list[Settled] = []
    for is_plain, group in groupby(batch, _is_plain):
        neighbours = list(group)
        parts = [neighbours] if is_plain else [[accepted] for accepted in neighbours]
        for part in parts:
            if settled and settled[-1].answer.status == 503:
                settled += map(_left, part)
            elif len(part) > 1:
                settled += _store_together(part)
            else:
                settled.append(_store_alone(part[0]))
    return settled


def _left(accepted: Accepted) -> Settled:
    metrics.note_wake(DOOR, "failed", len(accepted.decision.wakes))
    return _unstored(accepted)


def _is_plain(accepted: Accepted) -> bool:
    return accepted.digest is None and len(accepted.decision.wakes) == 1


def _store_together(batch: Sequence[Accepted]) -> list[Settled]:
    """Store requests of one wake each: events and records in one transaction.

    One that is refused (its session is full) undoes no other.
    """
    results: list[Receipt | WakeError] = []
    try:
        with columns.pipelined_transaction(), columns.as_one():
            results = dispatch_batch([accepted.decision.wakes[0] for accepted in batch])
            answered = [
                answers.of_error(result)
                if isinstance(result, WakeError)
                else answers.of_receipts(accepted.decision, [result])
                for accepted, result in zip(batch, results, strict=True)
            ]
            for accepted, answer in zip(batch, answered, strict=True):
                _complete(accepted.draft, answer, accepted.arrival, accepted.snapshot)
            _record([accepted.draft for accepted in batch])
    except StorageUnavailable:
        return [_unstored(accepted) for accepted in batch]
    except (DataError, IntegrityError):
        # It is one of them, such as one whose mapping was deleted this moment.
        return [
            Settled(answer, accepted.draft, is_recorded=False)
            if isinstance(result, WakeError)
            else _store_alone(accepted)
            for accepted, result, answer in zip(batch, results, answered, strict=True)
        ]
    except DatabaseError:
        # What was refused is counted already.
        refused = sum(isinstance(result, WakeError) for result in results)
        metrics.note_wake(DOOR, "failed", len(batch) - refused)
        return [_unstored(accepted) for accepted in batch]
    return [
        Settled(answer, accepted.draft, is_recorded=True)
        for accepted, answer in zip(batch, answered, strict=True)
    ]


def _store_alone(accepted: Accepted) -> Settled:
    """Store all of a request or nothing, in one transaction.

    1. Claim the idempotency key; a request that came before has the answer.
    2. Store the events. One that is refused (its session is full) undoes the others.
    3. Keep the answer under the key, record the delivery, clear the client's failed credentials.
    """
    arrival, digest, draft = accepted.arrival, accepted.digest, accepted.draft
    replayed = metrics.Counts()
    try:
        with columns.pipelined_transaction():
            first = idempotency.claim(digest, arrival.received_at) if digest else None
            if first is not None:
                answer = answers.of_replay(first)
                replayed.wake(DOOR, "replayed", _wakes_in(first))
            else:
                answer = answers.of_receipts(
                    accepted.decision, _dispatch_all(accepted.decision.wakes)
                )
                if digest:
                    idempotency.keep(digest, dict(answer.body or {}))
            _complete(draft, answer, arrival, accepted.snapshot)
            _record([draft])
            replayed.write()
    except DatabaseError:
        metrics.note_wake(DOOR, "failed", len(accepted.decision.wakes))
        return _unstored(accepted)
    except WakeError as error:
        return _settled_by(error, accepted)
    return Settled(answer, draft, is_recorded=True)


def _unstored(accepted: Accepted) -> Settled:
    return _settled_by(StorageUnavailable("the event could not be stored now; try again"), accepted)


def refused_by_storage(arrival: Arrival, error: WakeError) -> Settled | None:
    """Return a request settled that storage has never seen, or failed over; and count it.

    None when it would not have been accepted.
    """
    accepted = _begin_accepted(arrival)
    if accepted is None:
        return None
    metrics.note_wake(DOOR, "failed", len(accepted.decision.wakes))
    return _settled_by(error, accepted)


def _settled_by(error: WakeError, accepted: Accepted) -> Settled:
    answer = answers.of_error(error)
    _complete(accepted.draft, answer, accepted.arrival, accepted.snapshot)
    return Settled(answer, accepted.draft, is_recorded=False)


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


def _complete(draft: Draft, answer: Answer, arrival: Arrival, snapshot: HookConfiguration) -> None:
    draft.milliseconds = round((time.monotonic() - arrival.began) * 1000, 3)
    draft.status = answer.status
    draft.outcome = answer.outcome
    error = answer.error
    draft.error = _storable(error) if error else ""
    draft.answer = None if error else answer.body
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


def record(draft: Draft) -> None:
    """Store the record of a request that was not accepted. Failing to do so is only logged."""
    try:
        with transaction.atomic():
            _record([draft])
    except DatabaseError as error:
        logger.warning("hooks: delivery %s is not recorded: %s", draft.uid, error)


_COLUMNS: Final = (
    "uid",
    "received_at",
    "milliseconds",
    "client",
    "credential",
    "path",
    "status",
    "outcome",
    "answer",
)
# The other columns, as they are of a request to `/hooks/wake` whose body is not kept: most are, and
# what is known beforehand is not handed over row by row.
_PLAIN: Final[tuple[tuple[str, Any], ...]] = (
    ("credential_mappings", None),
    ("mapping_id", None),
    ("mapping_name", ""),
    ("error", ""),
    ("idempotency_key", ""),
    ("replay_of_id", None),
    ("has_body", False),
    ("body", None),
    ("headers", {}),
    ("query", {}),
)


def _record(drafts: Sequence[Draft]) -> None:
    """Store records, and forget the wrong credentials of their clients."""
    moment, uuid = columns.moments(), columns.uuids()
    rows: list[tuple[Any, ...]] = [
        (
            uuid(draft.uid),
            moment(draft.received_at),
            draft.milliseconds,
            draft.client,
            draft.credential,
            draft.path,
            draft.status,
            draft.outcome.value,
            columns.json_of(draft.answer),
        )
        for draft in drafts
    ]
    table = HookDelivery._meta.db_table
    with columns.as_one():
        if all(draft.is_plain for draft in drafts):
            columns.insert(table, _COLUMNS, rows, _PLAIN)
        else:
            rows = [row + _rest(draft) for row, draft in zip(rows, drafts, strict=True)]
            columns.insert(table, _COLUMNS + tuple(name for name, _ in _PLAIN), rows)
        # A replay is a person's; its client has shown nothing.
        throttling.clear({draft.client for draft in drafts if draft.replay_of_id is None})


def _rest(draft: Draft) -> tuple[Any, ...]:
    """Return what is stored in the columns of `_PLAIN`."""
    return (
        columns.json_of(draft.credential_mappings),
        draft.mapping_id,
        draft.mapping_name,
        draft.error,
        draft.idempotency_key,
        draft.replay_of_id,
        columns.flags()(draft.has_body),
        columns.blobs()(draft.body),
        columns.json_of(draft.headers),
        columns.json_of(draft.query),
    )


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

    Raises NotReplayable, NotAuthorized when today's mapping is not open to its credential, and
    StorageUnavailable when it came to nothing and that could not be recorded.
    """
    settled = take(arrival_again(delivery, now))
    if not settled.is_recorded:
        record(settled.draft)
    made = HookDelivery.objects.filter(uid=settled.draft.uid).first()
    if made is None:
        raise StorageUnavailable(settled.draft.error or "it could not be recorded; try again")
    return made


def _storable(text: str) -> str:
    """Return a text without what PostgreSQL stores in none: NUL, and halves of characters."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def _storable_all(values: dict[str, str]) -> dict[str, str]:
    return {_storable(name): _storable(value) for name, value in values.items()}
