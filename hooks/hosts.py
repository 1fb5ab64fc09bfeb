"""The Host of a hook: a wrong one is answered in JSON, as all that is wrong with a hook is."""

from __future__ import annotations

from collections.abc import Callable

from django.core.exceptions import DisallowedHost
from django.http import HttpRequest, HttpResponse, JsonResponse

from hooks.configuration import hooks


def refuse_unknown_host(
    get_response: Callable[[HttpRequest], HttpResponse],
) -> Callable[[HttpRequest], HttpResponse]:
    """Answer 400 to a hook whose Host is not in ALLOWED_HOSTS.

    Django would answer with a page, and with DEBUG with one that shows much of this site.
    """

    def refuse(request: HttpRequest) -> HttpResponse:
        if hooks().relative_path(request.path_info) is not None:
            try:
                request.get_host()
            except DisallowedHost:
                host = request.META.get("HTTP_HOST", "")
                text = f"Host {host[:120]!a} is not in ALLOWED_HOSTS"
                return JsonResponse({"ok": False, "error": text}, status=400)
        return get_response(request)

    return refuse
