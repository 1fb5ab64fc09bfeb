from __future__ import annotations

from typing import Any

from django.apps import AppConfig
from django.db.models.signals import post_delete, post_migrate, post_save


class WakeConfig(AppConfig):
    name = "wake"
    verbose_name = "Wake gateway"

    def ready(self) -> None:
        from wake import checks, configuration, doorbell  # noqa: F401 - importing registers checks
        from wake.models import Agent, GatewaySettings

        def forget(**_: Any) -> None:
            configuration.gateway.forget()
            doorbell.ring()

        for model in (Agent, GatewaySettings):
            for signal in (post_save, post_delete):
                signal.connect(
                    forget, sender=model, weak=False, dispatch_uid=f"{model}-{id(signal)}"
                )

        # After `migrate` (and after a test flushed the tables) the default agent is there again.
        def ensure_defaults(**_: Any) -> None:
            GatewaySettings.ensure()
            forget()

        post_migrate.connect(ensure_defaults, sender=self, weak=False, dispatch_uid="wake-defaults")
