"""The HTTP door: credential, body, decision, dispatch, receipt; and every error as an answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from django.core.exceptions import SuspiciousOperation
from django.db import DatabaseError
from django.http import HttpResponse
from django.http.response import HttpResponseBase
from django.utils import timezone
from rest_framework import status
from rest_framework.exceptions import AuthenticationFailed, MethodNotAllowed
from rest_framework.renderers import BaseRenderer, JSONRenderer
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from hooks.authentication import HookTokenAuthentication
from hooks.bodies import decode_json, read_body
from hooks.configuration import hooks
from hooks.decisions import decide, require_hook
from hooks.errors import BodyTooLarge, CredentialInQuery, UnknownHook
from hooks.template import HookRequest, visible_headers
from wake import configuration
from wake.dispatch import dispatch
from wake.errors import QueueFull, Refused, StorageUnavailable, WakeError

_STATUSES: Final[Mapping[type[WakeError], int]] = {
    Refused: status.HTTP_400_BAD_REQUEST,
    UnknownHook: status.HTTP_404_NOT_FOUND,
    BodyTooLarge: status.HTTP_413_REQUEST_ENTITY_TOO_LARGE,
    QueueFull: status.HTTP_429_TOO_MANY_REQUESTS,
    StorageUnavailable: status.HTTP_503_SERVICE_UNAVAILABLE,
}


class HookView(APIView):
    """`POST /hooks/wake` and the paths of the mappings; every hook ends in one `dispatch`."""

    http_method_names = ["post"]
    authentication_classes = [HookTokenAuthentication]
    renderer_classes = [JSONRenderer]

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Refuse what is wrong whoever asks, before the credential is looked at."""
        if request.method != "POST":
            raise MethodNotAllowed(request.method or "")
        if "token" in request.query_params:
            raise CredentialInQuery(
                "a token in the URL is not accepted; send it as Authorization: Bearer TOKEN"
            )
        super().initial(request, *args, **kwargs)

    def post(self, request: Request, path: str) -> Response:
        """Store the wake that the request asks for and answer with its receipt."""
        snapshot = hooks()
        require_hook(path, snapshot)
        asked = HookRequest(
            path=path,
            payload=decode_json(read_body(request, snapshot.max_body_bytes)),
            now=timezone.now(),
            headers=visible_headers(request.headers),
            query=request.query_params.dict(),
        )
        return Response(dispatch(decide(asked, snapshot, configuration.gateway())).as_json())

    def perform_content_negotiation(
        self, request: Request, force: bool = False
    ) -> tuple[BaseRenderer, str]:
        """Answer in JSON whatever the sender says it takes: few senders mean what they say."""
        renderer = JSONRenderer()
        return renderer, renderer.media_type

    def get_exception_handler(self) -> Callable[[Exception, Mapping[str, Any]], Any]:
        return answer_error


def answer_error(error: Exception, context: Mapping[str, Any]) -> HttpResponseBase | None:
    """Return the answer to a refusal or a failure; None for a defect, which is Django's (500)."""
    if isinstance(error, AuthenticationFailed):
        return HttpResponse(
            "Unauthorized\n",
            status=error.status_code,
            content_type="text/plain; charset=utf-8",
            headers={"WWW-Authenticate": "Bearer"},
        )
    if isinstance(error, MethodNotAllowed):
        return _failure(error.status_code, "method not allowed: use POST")
    if isinstance(error, SuspiciousOperation):
        return _failure(status.HTTP_400_BAD_REQUEST, "malformed request")
    if isinstance(error, DatabaseError):
        error = StorageUnavailable("the event could not be stored now; try again")
    for kind, code in _STATUSES.items():
        if isinstance(error, kind):
            return _failure(code, str(error), getattr(error, "retry_after_seconds", None))
    return None


def _failure(code: int, text: str, retry_after_seconds: int | None = None) -> Response:
    headers = None if retry_after_seconds is None else {"Retry-After": str(retry_after_seconds)}
    return Response({"ok": False, "error": text}, status=code, headers=headers)
