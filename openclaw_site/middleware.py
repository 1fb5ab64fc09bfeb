"""What no request may hold, and what a browser may run and load; for all pages alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from csp.constants import UNSAFE_EVAL, UNSAFE_INLINE
from csp.middleware import CSPMiddleware, PolicyParts
from django.core.exceptions import SuspiciousOperation
from django.http import HttpRequest, HttpResponse, HttpResponseBadRequest
from django.http.response import HttpResponseBase

NUL = "\0"

# What Unfold cannot do without: Alpine makes functions of the expressions in its attributes, and
# the colours are in a style element. Scripts still come from this site's files only.
_ADMIN_NEEDS: Final = {"script-src": [UNSAFE_EVAL], "style-src": [UNSAFE_INLINE]}


class ContentSecurityPolicy(CSPMiddleware):
    """The policy of the setting CONTENT_SECURITY_POLICY, with what the admin's pages need."""

    def get_policy_parts(
        self, request: HttpRequest, response: HttpResponseBase, report_only: bool = False
    ) -> PolicyParts:
        parts = super().get_policy_parts(request, response, report_only)
        if request.resolver_match and request.resolver_match.app_name == "admin":
            parts.update = _ADMIN_NEEDS
        return parts


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
