"""The HTTP door: credential, body, decision, storing, receipt; and every error as an answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

from django.core.exceptions import SuspiciousOperation
from django.db import DatabaseError
from django.http import HttpResponse
from django.http.response import HttpResponseBase
from django.utils import timezone
from rest_framework.exceptions import AuthenticationFailed, MethodNotAllowed
from rest_framework.renderers import BaseRenderer, JSONRenderer
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from hooks import answers, deliveries, throttling
from hooks.answers import Answer
from hooks.authentication import HookAuthentication, lower_case_headers, note_use
from hooks.bodies import read_body
from hooks.configuration import hooks
from hooks.credentials import Credential, refuse_in_query
from hooks.deliveries import Arrival
from hooks.errors import BodyTooLarge, NotAuthorized, TooManyFailures
from wake import metrics
from wake.errors import StorageUnavailable, WakeError


class HookView(APIView):
    """`POST /hooks/wake`, `/hooks/agent` and the paths of the mappings.

    What need not be done before the answer is done after it: `_afterwards`.
    """

    http_method_names = ["post"]
    authentication_classes = [HookAuthentication]
    renderer_classes = [JSONRenderer]

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Refuse what is wrong whoever asks, before the credential is looked at."""
        if request.method != "POST":
            raise MethodNotAllowed(request.method or "")
        refuse_in_query(request.query_params)
        self._began = time.monotonic()
        super().initial(request, *args, **kwargs)

    def post(self, request: Request, path: str) -> HttpResponseBase:
        """Store what the request asks for and answer with its receipt."""
        body, fault = b"", None
        try:
            body = read_body(request, hooks().max_body_bytes)
        except BodyTooLarge as error:
            fault = error
        arrival = Arrival(
            path=path,
            body=body,
            headers=lower_case_headers(request),
            query=request.query_params.dict(),
            credential=cast("Credential", request.auth),
            client=throttling.client_of(request.META),
            received_at=timezone.now(),
            fault=fault,
            began=self._began,
        )
        settled = deliveries.take(arrival)
        response = _response(settled.answer)
        _afterwards(response, partial(note_use, arrival.credential, arrival.received_at))
        if not settled.is_recorded:
            _afterwards(response, partial(deliveries.record, settled.draft))
        return response

    def handle_exception(self, exc: Exception) -> Response:
        """Answer a wrong credential with 401, or with 429 where there were too many."""
        if isinstance(exc, AuthenticationFailed | NotAuthorized):
            metrics.note_wake(deliveries.DOOR, "unauthorized")
            client = throttling.client_of(self.request.META)
            wait = throttling.note_failure(client, timezone.now())
            exc = AuthenticationFailed() if wait is None else TooManyFailures(wait)
        return super().handle_exception(exc)

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
        return _failure(400, "malformed request")
    if isinstance(error, DatabaseError):
        error = StorageUnavailable("the event could not be stored now; try again")
    return _response(answers.of_error(error)) if isinstance(error, WakeError) else None


def _failure(status: int, text: str) -> Response:
    return Response({"ok": False, "error": text}, status=status)


def _response(answer: Answer) -> HttpResponseBase:
    wait = answer.retry_after_seconds
    headers = None if wait is None else {"Retry-After": str(wait)}
    if answer.text:
        return HttpResponse(answer.text, content_type="text/plain; charset=utf-8")
    return Response(answer.body, status=answer.status, headers=headers)


def _afterwards(response: HttpResponseBase, do: Callable[[], None]) -> None:
    """Have something done when the answer has been sent."""
    response._resource_closers.append(do)  # type: ignore[attr-defined] # called by close()
