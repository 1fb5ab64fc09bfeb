"""A device's proof that it holds its Ed25519 key: pure.

The signed text and the failures are the protocol page's.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from typing import Final

from wake.gateway.frames import ConnectParams, Device
from wake.gateway.handshake import HandshakeRefused

MAX_SKEW_MILLISECONDS: Final = 2 * 60 * 1000


def verify(params: ConnectParams, *, nonce: str, now_ms: int) -> None:
    """Check the proof in `params.device`, if there is one; a right token needs none.

    `nonce` is the one of this connection's challenge, `now_ms` the present Unix time.
    Raises HandshakeRefused.
    """
    device = params.device
    if device is None:
        return
    key = _base64url(device.public_key)
    if hashlib.sha256(key).hexdigest() != device.id.lower():
        raise _refused("device identity mismatch", "DEVICE_AUTH_DEVICE_ID_MISMATCH")
    if abs(now_ms - device.signed_at) > MAX_SKEW_MILLISECONDS:
        raise _refused("device signature expired", "DEVICE_AUTH_SIGNATURE_EXPIRED")
    if device.nonce != nonce:
        raise _refused("device nonce mismatch", "DEVICE_AUTH_NONCE_MISMATCH")
    signature = _base64url(device.signature)
    if not any(_is_signed(key, signature, text) for text in signed_texts(params, device)):
        raise _refused("device signature invalid", "DEVICE_AUTH_SIGNATURE_INVALID")


def signed_texts(params: ConnectParams, device: Device) -> tuple[str, str]:
    """Return the texts that a device may have signed: version 2 and version 3."""
    client = params.client
    fields = (
        device.id,
        client.id,
        client.mode,
        params.role,
        ",".join(params.scopes),
        str(device.signed_at),
        (params.auth and params.auth.token) or "",
        device.nonce,
    )
    client_fields = (client.platform.lower(), (client.device_family or "").lower())
    return "|".join(("v2", *fields)), "|".join(("v3", *fields, *client_fields))


def _is_signed(key: bytes, signature: bytes, text: str) -> bool:
    # Imported at the first proof: most connections bring none.
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, text.encode())
    except (InvalidSignature, ValueError):
        return False
    return True


def _base64url(text: str) -> bytes:
    """Return what an unpadded base64url text stands for; nothing at all for a bad one."""
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return b""


def _refused(message: str, code: str) -> HandshakeRefused:
    return HandshakeRefused(message, {"code": code})
