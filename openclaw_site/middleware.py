"""What no request may hold, whatever it is for."""

from __future__ import annotations

from collections.abc import Callable

from django.core.exceptions import SuspiciousOperation
from django.http import HttpRequest, HttpResponse, HttpResponseBadRequest

NUL = "\0"


def refuse_nul(
    get_response: Callable[[HttpRequest], HttpResponse],
) -> Callable[[HttpRequest], HttpResponse]:
    """Answer 400 to a NUL character in the path, the query or a cookie.

    PostgreSQL stores none, so that looking one up would end in an error of the server.
    """

    def refuse(request: HttpRequest) -> HttpResponse:
        values = (request.path, *request.COOKIES.values(), *_query_values(request))
        if any(NUL in value for value in values):
            return HttpResponseBadRequest("a NUL character is not allowed\n", "text/plain")
        return get_response(request)

    return refuse


def _query_values(request: HttpRequest) -> list[str]:
    if "%00" not in request.META.get("QUERY_STRING", ""):
        return []
    try:
        return [value for _, values in request.GET.lists() for value in values]
    except SuspiciousOperation:  # more parameters than a URL may have
        return [NUL]
