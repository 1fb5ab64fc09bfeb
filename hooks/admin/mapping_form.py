"""The form of a mapping, and how it treats secrets: they go in and never come out."""

from __future__ import annotations

import secrets
from typing import Any, Final

from django import forms

from hooks import signatures, transforms
from hooks.models import HookMapping, SignatureScheme
from wake.admin.unfold_bases import (
    ModelForm,
    UnfoldAdminPasswordWidget,
    UnfoldAdminSelectWidget,
)
from wake.signing import new_signing_secret

# Fields that only mean something with one action, or with one scheme.
TURN_FIELDS: Final = ("deliver", "timeout_seconds")
HMAC_FIELDS: Final = (
    "signature_header",
    "signature_prefix",
    "signature_digest",
    "signature_encoding",
)

_SENTRY_HEADER: Final = "sentry-hook-signature"
_SENDER_MAKES: Final = frozenset({SignatureScheme.STRIPE, SignatureScheme.SLACK})


def sender_makes_secret(scheme: str, header: str) -> bool:
    """Whether the sender makes the secret itself (Stripe, Slack, Sentry) and takes no other."""
    return scheme in _SENDER_MAKES or (
        scheme == SignatureScheme.HMAC and header.lower() == _SENTRY_HEADER
    )


def new_secret(scheme: str) -> str:
    """Return a new secret that a sender of this scheme takes."""
    if scheme == SignatureScheme.STANDARD_WEBHOOKS:
        return new_signing_secret()
    return secrets.token_urlsafe(32)


def _fits(scheme: str, secret: str) -> bool:
    try:
        signatures.check_secret(scheme, secret)
    except ValueError:
        return False
    return True


class MappingForm(ModelForm):
    """A mapping as it is written in the admin.

    `made_secret` tells, once the form was found valid, that a secret was made, to be shown once.
    """

    made_secret = False
    _typed_secret = ""

    signing_secret = forms.CharField(
        required=False,
        label="Signing secret",
        widget=UnfoldAdminPasswordWidget({"autocomplete": "new-password"}),
    )
    transform = forms.ChoiceField(
        required=False,
        label="Transform",
        widget=UnfoldAdminSelectWidget,
        help_text=HookMapping._meta.get_field("transform").help_text,
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Else an empty field would count as a change of the secret that is stored.
        self.initial["signing_secret"] = ""
        if "signing_secret" in self.fields:
            self.fields["signing_secret"].help_text = self._secret_help()
        if isinstance(field := self.fields.get("agent"), forms.ModelChoiceField):
            field.empty_label = "the default agent"
        if isinstance(field := self.fields.get("transform"), forms.ChoiceField):
            field.choices = self._transforms()

    def _secret_help(self) -> str:
        if self.instance.signing_secret:
            return (
                "Empty: the stored one stays. A new one keeps the stored one valid as well, until "
                "“Drop the old secret”; one that was older ends."
            )
        return (
            "Empty: one is made when you save, and shown once. Stripe, Slack and Sentry make it "
            "themselves: paste the one that they show."
        )

    def _transforms(self) -> list[tuple[str, str]]:
        choices = [("", "none: the templates say it all")]
        for name in transforms.names():
            summary = transforms.summary(name)
            choices.append((name, f"{name}: {summary}" if summary else name))
        stored = self.instance.transform
        if stored and stored not in transforms.names():
            choices.append((stored, f"{stored} (not registered any more)"))
        return choices

    def clean(self) -> dict[str, Any] | None:
        cleaned = super().clean()
        self._forget_what_is_hidden()
        self._typed_secret = self.cleaned_data.get("signing_secret", "")
        self._settle_secrets()
        return cleaned

    def _post_clean(self) -> None:
        super()._post_clean()  # type: ignore[misc] # as Django's own forms with passwords do
        if self.errors and self._typed_secret:
            # It is not shown again, and an empty field would say that the stored one is to stay.
            self.add_error("signing_secret", "Type it again: nothing was saved.")

    def _forget_what_is_hidden(self) -> None:
        """Leave fields as they are that the page does not show: nobody could correct them."""
        hidden: list[str] = []
        if self.cleaned_data.get("action") != HookMapping.Action.AGENT:
            hidden += TURN_FIELDS
        if self.cleaned_data.get("signature_scheme") != SignatureScheme.HMAC:
            hidden += HMAC_FIELDS
        for name in hidden:
            self.errors.pop(name, None)
            self.cleaned_data[name] = getattr(self.instance, name)

    def _settle_secrets(self) -> None:
        """Decide which secrets are valid from now on: what was typed, what is stored, a new one."""
        scheme = self.cleaned_data.get("signature_scheme", "")
        header = self.cleaned_data.get("signature_header", "")
        typed = self._typed_secret
        stored = self.instance.signing_secret
        previous = self.instance.previous_signing_secret
        sender_makes = sender_makes_secret(scheme, header)
        if "signature_scheme" in self.changed_data and sender_makes:
            stored = previous = ""  # another sender's
        if not _fits(scheme, stored):
            stored = ""
        if typed and stored and typed != stored:
            previous = stored
        secret = typed or stored
        if scheme and not secret and not sender_makes:
            secret = new_secret(scheme)
            self.made_secret = True
        if not scheme:
            secret = previous = ""  # they open nothing any more
        if not _fits(scheme, previous):
            previous = ""
        self.cleaned_data["signing_secret"] = secret
        self.instance.previous_signing_secret = previous
