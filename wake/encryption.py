"""Secrets at rest: encrypted with a key derived from SECRET_KEY, which the database never holds."""

from __future__ import annotations

import base64
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.db import models

if TYPE_CHECKING:
    from cryptography.fernet import MultiFernet


@lru_cache(maxsize=4)
def _cipher(keys: tuple[str, ...]) -> MultiFernet:
    # Imported at the first secret: a command that needs none starts without the library.
    from cryptography.fernet import Fernet, MultiFernet
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    def derive(key: str) -> Fernet:
        derived = HKDF(SHA256(), 32, salt=None, info=b"openclaw wake gateway: secrets at rest")
        return Fernet(base64.urlsafe_b64encode(derived.derive(key.encode())))

    return MultiFernet([derive(key) for key in keys])


def _current_cipher() -> MultiFernet:
    return _cipher((settings.SECRET_KEY, *settings.SECRET_KEY_FALLBACKS))


# The configuration is read several times a second, and its secrets with it.
@lru_cache(maxsize=4096)
def _decrypted(value: str, keys: tuple[str, ...]) -> str:
    from cryptography.fernet import InvalidToken

    try:
        return _cipher(keys).decrypt(value.encode()).decode()
    except InvalidToken:
        return ""


class EncryptedTextField(models.TextField):  # type: ignore[type-arg]
    """A text that the database only sees encrypted; an empty one is stored empty.

    Reading with a SECRET_KEY that neither is nor follows (SECRET_KEY_FALLBACKS) the one it was
    written with gives an empty string: the secret is lost, not guessed at.
    """

    def get_prep_value(self, value: Any) -> Any:
        prepared = super().get_prep_value(value)
        return _current_cipher().encrypt(prepared.encode()).decode() if prepared else prepared

    def from_db_value(self, value: str | None, *_: Any) -> str | None:
        if not value:
            return value
        return _decrypted(value, (settings.SECRET_KEY, *settings.SECRET_KEY_FALLBACKS))
