"""Signatures of senders that cannot send a bearer token.

Every scheme sends an HMAC over the body as received, some with a time and an id ahead of it. They
differ in where they put what: that is the table `_SCHEMES`. The body is never decoded. Nothing here
touches Django or looks at a clock.

    github              https://docs.github.com/webhooks/using-webhooks/validating-webhook-deliveries
    standard-webhooks   https://github.com/standard-webhooks/standard-webhooks
    stripe              https://docs.stripe.com/webhooks/signature
    slack               https://docs.slack.dev/authentication/verifying-requests-from-slack
    hmac                header, prefix, digest and encoding as the mapping says
"""

from __future__ import annotations

import base64
import hmac
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from wake.signing import signing_key

TOLERANCE_SECONDS: Final = 300
MIN_SECRET_CHARACTERS: Final = 8

_TIMESTAMP = re.compile(r"[0-9]{1,12}")
# Visible ASCII without the dot. The dot ends the id in what is signed: with one in it, an old
# request could be cut up anew, and the start of its body be read as its time.
_MESSAGE_ID = re.compile(r"[!-\-/-~]+")
_URL_SAFE = bytes.maketrans(b"-_", b"+/")


@dataclass(frozen=True, slots=True)
class SignatureConfiguration:
    """How a mapping's sender signs. `secrets` are valid alike; with none, nothing is.

    `scheme` is a value of `hooks.models.SignatureScheme`. The rest counts for hmac alone:
    `header` in any case; `prefix` stands before the signature; `digest` is sha256, sha512 or
    sha1; `encoding` is hex or base64.
    """

    scheme: str
    secrets: tuple[str, ...] = field(default=(), repr=False)
    header: str = ""
    prefix: str = ""
    digest: str = "sha256"
    encoding: str = "hex"


@dataclass(frozen=True, slots=True)
class _Scheme:
    """Where a scheme puts what.

    `header` has entries between `separator`s, or one where there is none; the entries that start
    with `prefix` are signatures. `ahead` is what is signed before the body. A time, if there is
    one, is in a header of its own or in the entry of `header` that starts with `timestamp_prefix`.
    """

    header: str
    prefix: str
    separator: str = ""
    digest: str = "sha256"
    encoding: str = "hex"
    ahead: str = ""
    timestamp_header: str = ""
    timestamp_prefix: str = ""
    message_id_header: str = ""

    @property
    def is_timed(self) -> bool:
        return bool(self.timestamp_header or self.timestamp_prefix)


_SCHEMES: Final[Mapping[str, _Scheme]] = {
    "github": _Scheme("X-Hub-Signature-256", prefix="sha256="),
    "standard-webhooks": _Scheme(
        "webhook-signature",
        prefix="v1,",
        separator=" ",
        encoding="base64",
        ahead="{message_id}.{timestamp}.",
        timestamp_header="webhook-timestamp",
        message_id_header="webhook-id",
    ),
    "stripe": _Scheme(
        "Stripe-Signature",
        prefix="v1=",
        separator=",",
        ahead="{timestamp}.",
        timestamp_prefix="t=",
    ),
    "slack": _Scheme(
        "X-Slack-Signature",
        prefix="v0=",
        ahead="v0:{timestamp}:",
        timestamp_header="X-Slack-Request-Timestamp",
    ),
}


def is_signed(
    signature: SignatureConfiguration,
    headers: Mapping[str, str],
    body: bytes,
    now: datetime,
) -> bool:
    """Whether the request carries a right signature and, if the scheme is timed, a recent time.

    Recent is within 5 minutes of `now`, before or after. `headers` are all of the request's, by
    lower-case name; `body` is as it was received. Hex is read in either case, base64 also URL-safe
    and without its padding. Never raises, whatever was sent.
    """
    scheme = _scheme(signature)
    value = headers.get(scheme.header.lower(), "")
    if not value:
        return False  # so that a request with a token instead costs no HMAC
    entries = value.split(scheme.separator) if scheme.separator else [value]
    shown = [
        _canonical(entry.removeprefix(scheme.prefix), scheme.encoding)
        for entry in entries
        if entry.startswith(scheme.prefix)
    ]
    timestamp = _timestamp(scheme, headers, entries)
    message_id = headers.get(scheme.message_id_header.lower(), "")
    if scheme.is_timed and not _is_recent(timestamp, now):
        return False
    if scheme.message_id_header and not _MESSAGE_ID.fullmatch(message_id):
        return False
    passed = False
    for secret in filter(None, signature.secrets):
        try:
            key = _key(signature.scheme, secret)
        except ValueError:
            continue  # stored for another scheme: it can have signed nothing in this one
        expected = _canonical(_expected(scheme, key, body, timestamp, message_id), scheme.encoding)
        # No early end: how long it takes does not tell which secret, or which entry, was right.
        for candidate in shown:
            passed |= hmac.compare_digest(expected, candidate)
    return passed


def sign(
    signature: SignatureConfiguration, body: bytes, now: datetime, message_id: str = ""
) -> dict[str, str]:
    """Return the headers that a sender would send, signed with the first secret.

    Their names are spelled as the sender spells them. `message_id` is for Standard Webhooks; an
    empty one gets a new random id. Raises ValueError without a secret, for a secret that is none
    of the scheme, and for an id with dots or anything but visible ASCII.
    """
    scheme = _scheme(signature)
    secret = next(filter(None, signature.secrets), "")
    if not secret:
        raise ValueError("a signature needs a secret")
    key = _key(signature.scheme, secret)
    message_id = message_id or f"msg_{uuid.uuid4().hex}"
    if not _MESSAGE_ID.fullmatch(message_id):
        raise ValueError("a message id is visible ASCII without dots")
    timestamp = str(int(now.timestamp()))
    entries = [scheme.prefix + _expected(scheme, key, body, timestamp, message_id)]
    if scheme.timestamp_prefix:
        entries.insert(0, scheme.timestamp_prefix + timestamp)
    headers = {scheme.header: scheme.separator.join(entries)}
    if scheme.timestamp_header:
        headers[scheme.timestamp_header] = timestamp
    if scheme.message_id_header:
        headers[scheme.message_id_header] = message_id
    return headers


def check_secret(scheme: str, secret: str) -> None:
    """Raise ValueError when a secret cannot be one of the scheme; an empty one is none.

    The message says what to do and does not repeat the secret.
    """
    if not secret:
        return
    if scheme == "standard-webhooks":
        signing_key(secret)
    elif secret != secret.strip():
        raise ValueError("Remove the spaces or line breaks before and after the secret.")
    elif len(secret) < MIN_SECRET_CHARACTERS:
        raise ValueError(f"Use a secret of at least {MIN_SECRET_CHARACTERS} characters.")


def _scheme(signature: SignatureConfiguration) -> _Scheme:
    if signature.scheme != "hmac":
        return _SCHEMES[signature.scheme]
    return _Scheme(
        signature.header,
        signature.prefix,
        digest=signature.digest,
        encoding=signature.encoding,
    )


def _key(scheme: str, secret: str) -> bytes:
    """Return the HMAC's key. Raises ValueError when the secret is none of the scheme."""
    return signing_key(secret) if scheme == "standard-webhooks" else secret.encode()


def _timestamp(scheme: _Scheme, headers: Mapping[str, str], entries: list[str]) -> str:
    """Return the time as it was sent, unchecked; empty where there is none, or several."""
    if not scheme.timestamp_prefix:
        return headers.get(scheme.timestamp_header.lower(), "")
    times = [
        entry.removeprefix(scheme.timestamp_prefix)
        for entry in entries
        if entry.startswith(scheme.timestamp_prefix)
    ]
    return times[0] if len(times) == 1 else ""


def _expected(scheme: _Scheme, key: bytes, body: bytes, timestamp: str, message_id: str) -> str:
    """Return the right signature, as its sender writes it."""
    ahead = scheme.ahead.format(timestamp=timestamp, message_id=message_id)
    code = hmac.new(key, ahead.encode(), scheme.digest)
    code.update(body)
    if scheme.encoding == "base64":
        return base64.b64encode(code.digest()).decode("ascii")
    return code.hexdigest()


def _canonical(text: str, encoding: str) -> bytes:
    # What is not ASCII becomes a question mark, which no signature contains.
    written = text.encode("ascii", "replace")
    if encoding == "base64":
        return written.translate(_URL_SAFE).rstrip(b"=")
    return written.lower()


def _is_recent(timestamp: str, now: datetime) -> bool:
    """Whether a time in seconds since the epoch, in digits alone, is within the tolerance."""
    if not _TIMESTAMP.fullmatch(timestamp):
        return False
    return abs(now.timestamp() - int(timestamp)) <= TOLERANCE_SECONDS
