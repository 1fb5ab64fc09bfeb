"""What programs that watch over this one ask: `/healthz`, `/readyz` and `/metrics`.

They are answered before anything else looks at the request, whatever its Host: a probe comes with
an address as Host, and a database that hangs must not keep a process from saying that it lives.
No answer depends on the Host, and none but `/metrics` on who asks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from django.conf import settings
from django.db import DatabaseError
from django.http import HttpRequest, HttpResponse, HttpResponseNotAllowed
from django.utils import timezone

from wake import status
from wake.gateway import credentials, scopes
from wake.gateway.frames import Credentials
from wake.gateway.handshake import HandshakeRefused
from wake.heartbeats import pulse

UNAUTHORIZED: Final = (
    'unauthorized: send a gateway token that holds operator.read, as "Authorization: Bearer '
    'ocg_…", or sign in to the admin'
)
NO_DATABASE: Final = "the database does not answer"


def answer_probes(
    get_response: Callable[[HttpRequest], HttpResponse],
) -> Callable[[HttpRequest], HttpResponse]:
    """Answer the paths of PROBES, and pass everything else on."""

    def answer(request: HttpRequest) -> HttpResponse:
        probe = PROBES.get(request.path_info)
        if probe is None:
            return get_response(request)
        if request.method not in ("GET", "HEAD"):
            return HttpResponseNotAllowed(["GET", "HEAD"])
        response = probe(request)
        response["Cache-Control"] = "no-store"
        return response

    return answer


def healthz(request: HttpRequest) -> HttpResponse:
    """200 as long as the process answers at all."""
    return _plain("ok")


def readyz(request: HttpRequest) -> HttpResponse:
    """200 when wakes can be stored and, where heartbeats run, handed over; else 503 and why."""
    try:
        complaint = "" if status.is_migrated() else "the database is not migrated"
    except DatabaseError:
        complaint = NO_DATABASE
    complaint = complaint or pulse.complaint()
    return _plain(complaint, 503) if complaint else _plain("ok")


def metrics(request: HttpRequest) -> HttpResponse:
    """All metrics, for those who may look: a gateway token, the staff or, if so set, everybody."""
    # Imported here, because it takes its time and no command line needs it.
    from wake import exposition

    try:
        if not settings.METRICS_PUBLIC and not _may_look(request):
            return _plain(UNAUTHORIZED, 401, {"WWW-Authenticate": "Bearer"})
        return HttpResponse(exposition.page(timezone.now()), exposition.CONTENT_TYPE)
    except DatabaseError:
        return _plain(NO_DATABASE, 503)


PROBES: Final[Mapping[str, Callable[[HttpRequest], HttpResponse]]] = {
    "/healthz": healthz,
    "/readyz": readyz,
    "/metrics": metrics,
}


def _may_look(request: HttpRequest) -> bool:
    """Whether it comes with a gateway token or a session that may read. Raises DatabaseError."""
    kind, _, token = request.headers.get("Authorization", "").partition(" ")
    offered = Credentials(token=token.strip()) if kind.lower() == "bearer" else None
    session_key = request.COOKIES.get(settings.SESSION_COOKIE_NAME, "")
    try:
        credential = credentials.authenticate(offered, session_key, timezone.now())
    except HandshakeRefused:
        return False
    return scopes.includes(credential.scopes, scopes.READ)


def _plain(text: str, code: int = 200, headers: Mapping[str, str] | None = None) -> HttpResponse:
    content_type = "text/plain; charset=utf-8"
    return HttpResponse(f"{text}\n", content_type, code, headers=dict(headers or {}))
