from __future__ import annotations

from typing import Any

from django.apps import AppConfig
from django.db.models.signals import post_delete, post_migrate, post_save


class HooksConfig(AppConfig):
    name = "hooks"
    verbose_name = "HTTP hooks"

    def ready(self) -> None:
        from hooks import checks, configuration  # noqa: F401 - importing registers the checks
        from hooks.models import AllowedSessionPrefix, HookMapping, HookPolicy, HookToken

        def forget(**_: Any) -> None:
            configuration.hooks.forget()

        for model in (AllowedSessionPrefix, HookMapping, HookPolicy, HookToken):
            for signal in (post_save, post_delete):
                signal.connect(
                    forget, sender=model, weak=False, dispatch_uid=f"{model}-{id(signal)}"
                )

        # After `migrate` (and after a test flushed the tables) the policy is there again.
        def ensure_defaults(**_: Any) -> None:
            HookPolicy.ensure()
            forget()

        post_migrate.connect(
            ensure_defaults, sender=self, weak=False, dispatch_uid="hooks-defaults"
        )
