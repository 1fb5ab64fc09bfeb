"""Views that are imported when somebody asks for them: seldom, and not at each start."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from django.http.response import HttpResponseBase
from django.utils.module_loading import import_string
from django.views.decorators.csrf import csrf_exempt


def late_view(name: str) -> Callable[..., HttpResponseBase]:
    """Return a view that imports the class-based view of this dotted name at the first request.

    This is for views that only show something. They ask for no CSRF token, as REST framework's do:
    whatever else is asked of them they answer themselves.
    """

    @cache
    def view() -> Callable[..., HttpResponseBase]:
        made: Callable[..., HttpResponseBase] = import_string(name).as_view()
        return made

    def show(*args: Any, **kwargs: Any) -> HttpResponseBase:
        return view()(*args, **kwargs)

    return csrf_exempt(show)
