"""Signatures: each scheme against what its provider published, and against everything else."""

from __future__ import annotations

import base64
import hashlib
import hmac
import string
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Final

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from standardwebhooks import Webhook, WebhookVerificationError

from hooks.signatures import SignatureConfiguration, check_secret, is_signed, sign
from wake.signing import new_signing_secret, signature_headers

NOW: Final = datetime(2026, 11, 22, 16, 0, 1, tzinfo=UTC)
SECONDS: Final = str(int(NOW.timestamp()))
SECRET: Final = "correct horse battery staple"
KEY: Final = b"24 to 64 bytes, and no more than that"
SIGNING_SECRET: Final = "whsec_" + base64.b64encode(KEY).decode()
BODY: Final = '{"text": "grüß dich"}\n'.encode()

GITHUB: Final = SignatureConfiguration("github", (SECRET,))
STANDARD_WEBHOOKS: Final = SignatureConfiguration("standard-webhooks", (SIGNING_SECRET,))
STRIPE: Final = SignatureConfiguration("stripe", (SECRET,))
SLACK: Final = SignatureConfiguration("slack", (SECRET,))
HMAC: Final = SignatureConfiguration("hmac", (SECRET,), header="X-Signature", prefix="mac=")
HMAC_BASE64: Final = replace(HMAC, digest="sha512", encoding="base64")
IN_BASE64: Final = [STANDARD_WEBHOOKS, HMAC_BASE64]
TIMED: Final = [STANDARD_WEBHOOKS, STRIPE, SLACK]
ALL: Final = [GITHUB, *TIMED, HMAC, HMAC_BASE64]

each_scheme = pytest.mark.parametrize("signature", ALL, ids=lambda s: f"{s.scheme} {s.digest}")
each_timed_scheme = pytest.mark.parametrize("signature", TIMED, ids=lambda s: s.scheme)


def sent(
    signature: SignatureConfiguration, body: bytes = BODY, at: datetime = NOW
) -> dict[str, str]:
    """Return the headers of a signed request as the server shows them: by lower-case name."""
    return {name.lower(): value for name, value in sign(signature, body, at).items()}


def sent_with_time(signature: SignatureConfiguration, written: str) -> dict[str, str]:
    """Return headers whose time is written like that and signed rightly, by the schemes' texts."""
    time = written.encode()
    match signature.scheme:
        case "standard-webhooks":
            code = hmac.digest(KEY, b"msg_1." + time + b"." + BODY, "sha256")
            shown = "v1," + base64.b64encode(code).decode()
            return {
                "webhook-id": "msg_1",
                "webhook-timestamp": written,
                "webhook-signature": shown,
            }
        case "stripe":
            code = hmac.digest(SECRET.encode(), time + b"." + BODY, "sha256")
            return {"stripe-signature": f"t={written},v1={code.hex()}"}
        case _:
            code = hmac.digest(SECRET.encode(), b"v0:" + time + b":" + BODY, "sha256")
            return {"x-slack-request-timestamp": written, "x-slack-signature": f"v0={code.hex()}"}


# What providers publish.


def openssl_signature(secret: str, body: bytes) -> str:
    """Return GitHub's header value, computed by a program that shares no code with this one."""
    command = ["openssl", "dgst", "-sha256", "-hmac", secret]
    done = subprocess.run(command, input=body, capture_output=True, check=True)
    return "sha256=" + done.stdout.decode().split()[-1]


@pytest.fixture(scope="module")
def github_headers() -> dict[str, str]:
    """The headers of a request that openssl signed."""
    return {"x-hub-signature-256": openssl_signature(SECRET, BODY), "x-github-event": "push"}


def test_a_request_that_openssl_signed_for_github_is_accepted(
    github_headers: dict[str, str],
) -> None:
    assert is_signed(GITHUB, github_headers, BODY, NOW)


def test_any_changed_byte_of_the_body_is_refused(github_headers: dict[str, str]) -> None:
    for place in range(len(BODY)):
        changed = BODY[:place] + bytes([BODY[place] ^ 1]) + BODY[place + 1 :]
        assert not is_signed(GITHUB, github_headers, changed, NOW)


def test_any_changed_digit_of_the_signature_is_refused(github_headers: dict[str, str]) -> None:
    shown = github_headers["x-hub-signature-256"]
    for place in range(len("sha256="), len(shown)):
        digit = "0" if shown[place] != "0" else "1"
        changed = {"x-hub-signature-256": shown[:place] + digit + shown[place + 1 :]}
        assert not is_signed(GITHUB, changed, BODY, NOW)


def test_githubs_published_example_is_accepted() -> None:
    signature = SignatureConfiguration("github", ("It's a Secret to Everybody",))
    shown = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
    assert is_signed(signature, {"x-hub-signature-256": shown}, b"Hello, World!", NOW)


def test_slacks_published_example_is_accepted() -> None:
    signature = SignatureConfiguration("slack", ("8f742231b10e8888abcd99yyyzzz85a5",))
    headers = {
        "x-slack-request-timestamp": "1531420618",
        "x-slack-signature": (
            "v0=a2114d57b48eac39b9ad189dd8316235a7b4a8d21a10bd27519666489c69b503"
        ),
    }
    body = (
        b"token=xyzz0WbapA4vBCDEFasx0q6G&team_id=T1DC2JH3J&team_domain=testteamnow"
        b"&channel_id=G8PSS9T3V&channel_name=foobar&user_id=U2CERLKJA&user_name=roadrunner"
        b"&command=%2Fwebhook-collect&text=&response_url=https%3A%2F%2Fhooks.slack.com"
        b"%2Fcommands%2FT1DC2JH3J%2F397700885554%2F96rGlfmibIGlgcZRskXaIFfN"
        b"&trigger_id=398738663015.47445629121.803a0bc887a14d10d2c447fce8b6703c"
    )
    assert is_signed(signature, headers, body, datetime.fromtimestamp(1531420618, UTC))


def test_the_published_example_of_standard_webhooks_is_accepted() -> None:
    signature = SignatureConfiguration(
        "standard-webhooks", ("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",)
    )
    headers = {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }
    body = b'{"test": 2432232314}'
    assert is_signed(signature, headers, body, datetime.fromtimestamp(1614265330, UTC))


def test_the_example_in_stripes_own_library_is_accepted() -> None:
    # stripe-dotnet, EventUtilityTest: its secret, its time, its event_test_signature.json.
    signature = SignatureConfiguration("stripe", ("webhook_secret",))
    shown = (
        "t=1533204620,v1=2220f87ef101a04665f11cdf770523143f875572008577fa0f20882ddb9cc3c7,"
        "v0=63f3a72374a733066c4be69ed7f8e5ac85c22c9f0a6a612ab9a025a9e4ee7eef"
    )
    body = b"""{
  "id": "evt_123",
  "object": "event",
  "account": "acct_123",
  "api_version": "2017-05-25",
  "created": 1533204620,
  "data": {
    "object": {
      "id": "cus_123",
      "object": "customer",
      "created": 123456789,
      "email": "test@stripe.com",
      "livemode": false,
      "metadata": {}
    }
  },
  "livemode": false,
  "pending_webhooks": 1,
  "request": {
    "id": "req_123",
    "idempotency_key": "idempotency-key-123"
  },
  "type": "customer.created"
}
"""
    now = datetime.fromtimestamp(1533204620, UTC)
    assert is_signed(signature, {"stripe-signature": shown}, body, now)


def test_what_the_public_library_of_standard_webhooks_signs_is_accepted() -> None:
    secret = new_signing_secret()
    headers = {
        "webhook-id": "msg_1",
        "webhook-timestamp": SECONDS,
        "webhook-signature": Webhook(secret).sign("msg_1", NOW, BODY.decode()),
    }
    signature = SignatureConfiguration("standard-webhooks", (secret,))
    assert is_signed(signature, headers, BODY, NOW)


def test_the_public_library_of_standard_webhooks_accepts_what_is_signed_here() -> None:
    secret = new_signing_secret()
    headers = sign(
        SignatureConfiguration("standard-webhooks", (secret,)), BODY, datetime.now(UTC), "msg_1"
    )
    Webhook(secret).verify(BODY, headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(secret).verify(BODY + b" ", headers)


def test_one_gateway_accepts_what_another_sends() -> None:
    headers = signature_headers(SIGNING_SECRET, "msg_1", BODY, NOW)
    assert is_signed(STANDARD_WEBHOOKS, headers, BODY, NOW)


# All schemes.


@each_scheme
@given(body=st.binary(max_size=200), seconds=st.integers(-300, 300))
@settings(max_examples=40)
def test_a_signed_request_always_passes(
    signature: SignatureConfiguration, body: bytes, seconds: int
) -> None:
    assert is_signed(signature, sent(signature, body, NOW + timedelta(seconds=seconds)), body, NOW)


@each_scheme
@given(body=st.binary(min_size=1, max_size=200), data=st.data())
@settings(max_examples=40)
def test_a_flipped_byte_in_the_body_never_passes(
    signature: SignatureConfiguration, body: bytes, data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, len(body) - 1))
    flip = data.draw(st.integers(1, 255))
    changed = body[:place] + bytes([body[place] ^ flip]) + body[place + 1 :]
    assert not is_signed(signature, sent(signature, body), changed, NOW)


@each_scheme
@given(data=st.data())
@settings(max_examples=150)
def test_a_changed_character_in_the_headers_never_passes(
    signature: SignatureConfiguration, data: st.DataObject
) -> None:
    headers = sent(signature)
    name = data.draw(st.sampled_from(sorted(headers)))
    value = headers[name]
    place = data.draw(st.integers(0, len(value) - 1))
    changed = data.draw(st.sampled_from(sorted(set(string.printable + "é²") - {value[place]})))
    # What means the same: a hexadecimal digit in the other case, the URL-safe digits of base64.
    assume(signature in IN_BASE64 or changed != value[place].swapcase())
    assume({changed, value[place]} not in ({"+", "-"}, {"/", "_"}))
    headers[name] = value[:place] + changed + value[place + 1 :]
    assert not is_signed(signature, headers, BODY, NOW)


@each_scheme
@given(data=st.data(), added=st.sampled_from("x0\x00\t\né\N{FULLWIDTH DIGIT ONE}"))
@settings(max_examples=100)
def test_an_added_character_in_the_headers_never_passes(
    signature: SignatureConfiguration, data: st.DataObject, added: str
) -> None:
    headers = sent(signature)
    name = data.draw(st.sampled_from(sorted(headers)))
    place = data.draw(st.integers(0, len(headers[name])))
    headers[name] = headers[name][:place] + added + headers[name][place:]
    assert not is_signed(signature, headers, BODY, NOW)


HEADER_VALUES: Final = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="tv01=, .+-_/\x00éabcdef", max_size=60),
    st.sampled_from([f"t={SECONDS},v1=", "v0=", "v1,", "sha256=", "mac=", "t=1,t=1"]),
    st.integers(-10, 10**40).map(str),
    st.just(SECONDS),
)


@each_scheme
@given(data=st.data(), body=st.binary(max_size=60))
@settings(max_examples=60)
def test_arbitrary_headers_bodies_and_secrets_never_raise_and_never_pass(
    signature: SignatureConfiguration, data: st.DataObject, body: bytes
) -> None:
    secrets = data.draw(st.lists(st.text(max_size=40) | st.just(SIGNING_SECRET), max_size=3))
    headers = {name: data.draw(HEADER_VALUES) for name in sent(signature)}
    assert not is_signed(replace(signature, secrets=tuple(secrets)), headers, body, NOW)


@each_scheme
def test_a_request_that_lacks_any_of_the_headers_is_refused(
    signature: SignatureConfiguration,
) -> None:
    headers = sent(signature)
    for missing in headers:
        rest = {name: value for name, value in headers.items() if name != missing}
        assert not is_signed(signature, rest, BODY, NOW)


@each_scheme
def test_a_body_that_is_no_text_can_be_signed(signature: SignatureConfiguration) -> None:
    body = b"\xff\xfe\x00{"
    assert is_signed(signature, sent(signature, body), body, NOW)
    assert not is_signed(signature, sent(signature, body), b"\xff\xfe\x00[", NOW)


@each_scheme
def test_either_of_two_secrets_signs(signature: SignatureConfiguration) -> None:
    old, new, foreign = (replace(signature, secrets=(new_signing_secret(),)) for _ in range(3))
    receiver = replace(signature, secrets=new.secrets + old.secrets)
    assert is_signed(receiver, sent(new), BODY, NOW)
    assert is_signed(receiver, sent(old), BODY, NOW)
    assert not is_signed(receiver, sent(foreign), BODY, NOW)


@each_scheme
def test_an_empty_previous_secret_changes_nothing(signature: SignatureConfiguration) -> None:
    receiver = replace(signature, secrets=("", *signature.secrets, ""))
    assert is_signed(receiver, sent(signature), BODY, NOW)


@each_scheme
@pytest.mark.parametrize("secrets", [(), ("",), ("", "")])
def test_without_a_secret_nothing_is_signed(
    signature: SignatureConfiguration, secrets: tuple[str, ...]
) -> None:
    assert not is_signed(replace(signature, secrets=secrets), sent(signature), BODY, NOW)


def test_an_empty_secret_is_no_key() -> None:
    shown = "sha256=" + hmac.digest(b"", BODY, "sha256").hex()
    receiver = replace(GITHUB, secrets=("",))
    assert not is_signed(receiver, {"x-hub-signature-256": shown}, BODY, NOW)


def test_a_secret_of_another_scheme_does_not_stand_in_the_way() -> None:
    receiver = replace(STANDARD_WEBHOOKS, secrets=("ghs_no_base64", SIGNING_SECRET))
    assert is_signed(receiver, sent(STANDARD_WEBHOOKS), BODY, NOW)


# Time.


@each_timed_scheme
@pytest.mark.parametrize("minutes", [-6, 6])
def test_a_time_six_minutes_away_is_refused(
    signature: SignatureConfiguration, minutes: int
) -> None:
    at = NOW + timedelta(minutes=minutes)
    assert not is_signed(signature, sent(signature, at=at), BODY, NOW)


@each_timed_scheme
@pytest.mark.parametrize("sign_of_time", [-1, 1])
def test_the_limit_is_five_minutes_to_the_second(
    signature: SignatureConfiguration, sign_of_time: int
) -> None:
    for seconds, accepted in [(300, True), (301, False)]:
        at = NOW + timedelta(seconds=seconds) * sign_of_time
        assert is_signed(signature, sent(signature, at=at), BODY, NOW) is accepted


def test_githubs_signature_has_no_time() -> None:
    assert is_signed(GITHUB, sent(GITHUB), BODY, NOW + timedelta(days=400))


def test_an_hmac_has_no_time() -> None:
    assert is_signed(HMAC, sent(HMAC), BODY, NOW + timedelta(days=400))


@each_timed_scheme
@pytest.mark.parametrize(
    "written",
    [
        f"{SECONDS}.0",
        f"+{SECONDS}",
        f"-{SECONDS}",
        f" {SECONDS}",
        f"{SECONDS} ",
        f"{SECONDS}\n",
        f"{SECONDS[:4]}_{SECONDS[4:]}",
        hex(int(SECONDS)),
        f"{SECONDS}e0",
        "".join(chr(ord("\N{FULLWIDTH DIGIT ZERO}") + int(digit)) for digit in SECONDS),
        SECONDS.replace("1", "\N{SUPERSCRIPT ONE}"),
        "nan",
        "inf",
        "9" * 13,
        "9" * 5000,
        "",
    ],
)
def test_a_time_that_is_not_plain_seconds_is_refused_though_signed(
    signature: SignatureConfiguration, written: str
) -> None:
    assert is_signed(signature, sent_with_time(signature, SECONDS), BODY, NOW)
    assert not is_signed(signature, sent_with_time(signature, written), BODY, NOW)


# Stripe.


def test_any_of_stripes_signatures_will_do() -> None:
    time, shown = sent(STRIPE)["stripe-signature"].split(",")
    wrong = "v1=" + "0" * 64
    for value in (f"{time},{wrong},{shown}", f"{time},{shown},{wrong}", f"{shown},{time}"):
        assert is_signed(STRIPE, {"stripe-signature": value}, BODY, NOW)


def test_stripes_test_signature_is_no_signature() -> None:
    value = sent(STRIPE)["stripe-signature"].replace("v1=", "v0=")
    assert not is_signed(STRIPE, {"stripe-signature": value}, BODY, NOW)


def test_two_times_of_stripe_are_refused() -> None:
    value = sent(STRIPE)["stripe-signature"]
    for header in (f"{value},t={SECONDS}", f"t=1,{value}", f"{value},t="):
        assert not is_signed(STRIPE, {"stripe-signature": header}, BODY, NOW)


def test_stripes_secret_is_used_as_it_is_written() -> None:
    signature = SignatureConfiguration("stripe", (SIGNING_SECRET,))
    code = hmac.digest(SIGNING_SECRET.encode(), f"{SECONDS}.".encode() + BODY, "sha256")
    headers = {"stripe-signature": f"t={SECONDS},v1={code.hex()}"}
    assert is_signed(signature, headers, BODY, NOW)


# Standard Webhooks.


def test_any_signature_of_standard_webhooks_will_do_and_other_versions_are_ignored() -> None:
    headers = sent(STANDARD_WEBHOOKS)
    right = headers["webhook-signature"]
    for value in (f"v1a,AAAA v2,AAAA v1,AAAA {right}", f"{right} v1,AAAA", f" nonsense  {right}"):
        headers["webhook-signature"] = value
        assert is_signed(STANDARD_WEBHOOKS, headers, BODY, NOW)


def test_a_right_signature_under_another_version_is_refused() -> None:
    headers = sent(STANDARD_WEBHOOKS)
    for version in ("v1a,", "v2,", "V1,", "v1=", ""):
        changed = sent(STANDARD_WEBHOOKS) | {
            "webhook-signature": headers["webhook-signature"].replace("v1,", version)
        }
        assert not is_signed(STANDARD_WEBHOOKS, changed, BODY, NOW)


def test_an_old_request_of_standard_webhooks_cannot_be_cut_up_anew() -> None:
    # An old message whose body starts like a time: its own time becomes part of the id.
    body = f"{SECONDS}.5".encode()
    headers = sent(STANDARD_WEBHOOKS, body, NOW - timedelta(days=30))
    recut = headers | {
        "webhook-id": f"{headers['webhook-id']}.{headers['webhook-timestamp']}",
        "webhook-timestamp": SECONDS,
    }
    assert not is_signed(STANDARD_WEBHOOKS, recut, b"5", NOW)


# HMAC in a header of one's choice.


@pytest.mark.parametrize("digest", ["sha1", "sha256", "sha512"])
@pytest.mark.parametrize("encoding", ["hex", "base64"])
def test_an_hmac_has_the_digest_and_the_encoding_that_is_set(digest: str, encoding: str) -> None:
    code = hmac.new(SECRET.encode(), BODY, getattr(hashlib, digest)).digest()
    shown = code.hex() if encoding == "hex" else base64.b64encode(code).decode()
    for other in ("sha1", "sha256", "sha512"):
        for otherwise in ("hex", "base64"):
            receiver = replace(HMAC, prefix="", digest=other, encoding=otherwise)
            accepted = (other, otherwise) == (digest, encoding)
            assert is_signed(receiver, {"x-signature": shown}, BODY, NOW) is accepted


def test_an_hmac_in_hex_may_be_in_upper_case() -> None:
    shown = "mac=" + hmac.digest(SECRET.encode(), BODY, "sha256").hex().upper()
    assert is_signed(HMAC, {"x-signature": shown}, BODY, NOW)


def test_an_hmac_in_base64_may_be_url_safe_and_unpadded() -> None:
    # A body whose signature has characters that differ between the two alphabets.
    body = next(
        body
        for body in (str(number).encode() for number in range(1000))
        if {"+", "/"} <= set(sent(HMAC_BASE64, body)["x-signature"])
    )
    code = hmac.digest(SECRET.encode(), body, "sha512")
    for shown in (base64.b64encode(code).decode(), base64.urlsafe_b64encode(code).decode()):
        for written in (shown, shown.rstrip("=")):
            assert is_signed(HMAC_BASE64, {"x-signature": f"mac={written}"}, body, NOW)


def test_the_case_of_the_configured_header_does_not_matter() -> None:
    headers = sent(HMAC)
    for name in ("X-Signature", "x-signature", "X-SIGNATURE"):
        assert is_signed(replace(HMAC, header=name), headers, BODY, NOW)


def test_an_hmac_needs_its_prefix() -> None:
    shown = sent(HMAC)["x-signature"].removeprefix("mac=")
    for written in (shown, f"MAC={shown}", f"mac=mac={shown}", f" mac={shown}"):
        assert not is_signed(HMAC, {"x-signature": written}, BODY, NOW)


# Secrets, and signing.


@pytest.mark.parametrize(
    ("scheme", "secret"),
    [
        ("github", ""),
        ("standard-webhooks", ""),
        ("github", "12345678"),
        ("stripe", "whsec_abcdefgh"),
        ("slack", "8f742231b10e8888abcd99yyyzzz85a5"),
        ("hmac", "with spaces inside"),
        ("hmac", "größer!!"),
        ("standard-webhooks", SIGNING_SECRET),
        ("standard-webhooks", SIGNING_SECRET.rstrip("=")),
    ],
)
def test_a_secret_that_can_be_one_is_accepted(scheme: str, secret: str) -> None:
    check_secret(scheme, secret)


@pytest.mark.parametrize("scheme", ["github", "stripe", "slack", "hmac", "standard-webhooks"])
@pytest.mark.parametrize("secret", ["1234567", f"{SIGNING_SECRET} ", f"\n{SIGNING_SECRET}"])
def test_a_short_secret_and_one_with_space_around_it_are_refused(scheme: str, secret: str) -> None:
    with pytest.raises(ValueError, match=r"secret") as refused:
        check_secret(scheme, secret)
    assert secret.strip() not in str(refused.value)


@pytest.mark.parametrize("secret", [SECRET, "whsec_", "whsec_c2hvcnQ=", SIGNING_SECRET[6:]])
def test_a_secret_of_standard_webhooks_is_whsec_and_base64(secret: str) -> None:
    with pytest.raises(ValueError, match="whsec_ and 24 to 64 bytes in base64"):
        check_secret("standard-webhooks", secret)


@each_scheme
def test_the_first_secret_signs(signature: SignatureConfiguration) -> None:
    sender = replace(signature, secrets=("", *signature.secrets, new_signing_secret()))
    assert is_signed(signature, sent(sender), BODY, NOW)


def test_headers_are_spelled_as_the_sender_spells_them() -> None:
    names = [sorted(sign(signature, BODY, NOW)) for signature in ALL]
    assert names == [
        ["X-Hub-Signature-256"],
        ["webhook-id", "webhook-signature", "webhook-timestamp"],
        ["Stripe-Signature"],
        ["X-Slack-Request-Timestamp", "X-Slack-Signature"],
        ["X-Signature"],
        ["X-Signature"],
    ]


def test_each_message_of_standard_webhooks_has_an_id_of_its_own() -> None:
    first, second = (sent(STANDARD_WEBHOOKS)["webhook-id"] for _ in range(2))
    assert first != second


@pytest.mark.parametrize("message_id", ["a.b", "a b", "é", "a\r\nx: y"])
def test_an_id_that_a_receiver_would_refuse_is_not_signed(message_id: str) -> None:
    with pytest.raises(ValueError, match="message id"):
        sign(STANDARD_WEBHOOKS, BODY, NOW, message_id)


def test_without_a_secret_there_is_nothing_to_sign_with() -> None:
    with pytest.raises(ValueError, match="needs a secret"):
        sign(replace(GITHUB, secrets=("",)), BODY, NOW)


def test_a_configuration_does_not_show_its_secrets() -> None:
    assert SECRET not in repr(GITHUB)
