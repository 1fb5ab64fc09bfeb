"""The console: the page at `/`, a client of the gateway protocol for people."""

from __future__ import annotations

from django.contrib.admin.views.decorators import staff_member_required
from django.contrib.auth.views import redirect_to_login
from django.db.models import Model
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import reverse
from django.views.decorators.http import require_safe

from wake.admin.screens import list_url
from wake.models import PresenceEntry, Session, SystemEvent
from wake.status import version


@require_safe
@staff_member_required
def console(request: HttpRequest) -> HttpResponse:
    """`GET /` for the staff; anybody else is sent to the admin's login page.

    The page holds nothing of what is stored. Its script asks the gateway for it, which knows what
    the user may see and do.
    """
    pages: list[tuple[str, type[Model], str]] = [
        ("sessions", Session, "q="),
        ("dead_letters", SystemEvent, "state__exact=dead&q="),
        ("presence", PresenceEntry, ""),
    ]
    context = {
        "login_url": redirect_to_login(reverse("console")).url,
        "version": version(),
        # Addresses in the admin that this user may open; a session key can be put after them.
        "pages": {
            name: list_url(model, query)
            for name, model, query in pages
            if request.user.has_perm(f"wake.view_{model._meta.model_name}")
        },
    }
    return render(request, "wake/console.html", context)
