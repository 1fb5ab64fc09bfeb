"""The ASGI application: HTTP to Django, WebSocket to the gateway, heartbeats with the lifespan."""

from __future__ import annotations

import os
import warnings

from channels.routing import ProtocolTypeRouter, URLRouter  # type: ignore[import-untyped]
from channels.security.websocket import WebsocketDenier  # type: ignore[import-untyped]
from django.core.asgi import get_asgi_application
from django.urls import path, re_path

# Static files are read whole before they are sent; they are small, and browsers keep them.
warnings.filterwarnings("ignore", message="StreamingHttpResponse must consume synchronous")

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "openclaw_site.settings")
# First of all: it sets Django up, without which no model can be imported.
django_application = get_asgi_application()

from hooks import lane  # noqa: E402
from hooks.bodies import BodyLimit  # noqa: E402
from hooks.lane import HookLane  # noqa: E402
from wake.gateway.connection import Connection  # noqa: E402
from wake.lifespan import Lifespan  # noqa: E402

connection = Connection.as_asgi()

application = HookLane(
    ProtocolTypeRouter(
        {
            "http": BodyLimit(django_application),  # type: ignore[arg-type] # Django's are loose
            "websocket": URLRouter(
                [
                    path("", connection),
                    path("ws", connection),
                    re_path("", WebsocketDenier.as_asgi()),
                ]
            ),
            "lifespan": Lifespan(lane.running),
        }
    )
)
