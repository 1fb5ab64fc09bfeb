from __future__ import annotations

from importlib import import_module
from typing import Any

from django.apps import AppConfig
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db.models.signals import m2m_changed, post_delete, post_migrate, post_save


class HooksConfig(AppConfig):
    name = "hooks"
    verbose_name = "HTTP hooks"

    def ready(self) -> None:
        # Importing registers them.
        from hooks import checks, configuration, pruning, shipped_transforms  # noqa: F401
        from hooks.models import AllowedSessionPrefix, HookMapping, HookPolicy, HookToken

        for module in settings.HOOK_TRANSFORMS:
            try:
                import_module(module)
            except Exception as error:
                raise ImproperlyConfigured(
                    f"HOOK_TRANSFORMS: cannot import {module}: {type(error).__name__}: {error}"
                ) from error

        def forget(**_: Any) -> None:
            configuration.hooks.forget()

        for model in (AllowedSessionPrefix, HookMapping, HookPolicy, HookToken):
            for signal in (post_save, post_delete):
                signal.connect(
                    forget, sender=model, weak=False, dispatch_uid=f"{model}-{id(signal)}"
                )

        for linked in (HookPolicy.allowed_agents.through, HookToken.mappings.through):
            m2m_changed.connect(forget, sender=linked, weak=False, dispatch_uid=f"{linked}")

        # After `migrate` (and after a test flushed the tables) the policy is there again.
        def ensure_defaults(**_: Any) -> None:
            HookPolicy.ensure()
            forget()

        post_migrate.connect(
            ensure_defaults, sender=self, weak=False, dispatch_uid="hooks-defaults"
        )
