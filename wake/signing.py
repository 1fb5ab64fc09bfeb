"""Signing what the gateway sends, per Standard Webhooks (https://www.standardwebhooks.com)."""

from __future__ import annotations

import base64
import binascii
import secrets
from datetime import UTC, datetime
from typing import Final

PREFIX: Final = "whsec_"
# The specification asks for 24 to 64 random bytes.
MIN_KEY_BYTES: Final = 24
MAX_KEY_BYTES: Final = 64
_NEW_KEY_BYTES = 32


def new_signing_secret() -> str:
    """Return a new secret: `whsec_` and 32 random bytes in base64."""
    return PREFIX + base64.b64encode(secrets.token_bytes(_NEW_KEY_BYTES)).decode("ascii")


def signing_key(secret: str) -> bytes:
    """Return the key that a secret stands for.

    Raises ValueError when it is not `whsec_` and 24 to 64 bytes in base64. The message does not
    repeat the secret.
    """
    encoded = secret.removeprefix(PREFIX).rstrip("=")
    try:
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("a signing secret is whsec_ and 24 to 64 bytes in base64") from error
    if not secret.startswith(PREFIX) or not MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
        raise ValueError("a signing secret is whsec_ and 24 to 64 bytes in base64")
    return key


def signature_headers(secret: str, message_id: str, body: bytes, now: datetime) -> dict[str, str]:
    """Return the three `webhook-…` headers over exactly these bytes, which must be UTF-8.

    Raises ValueError when the secret is none.
    """
    # Imported here: the admin, which only makes secrets, needs no library for it.
    from standardwebhooks import Webhook

    now = now.astimezone(UTC)
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": Webhook(signing_key(secret)).sign(message_id, now, body.decode()),
    }
