"""Django settings, all of them from the environment with defaults that serve one machine safely.

The table of variables is in docs/operations.md.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import environ  # type: ignore[import-untyped]
from csp.constants import NONE, SELF
from django.core.exceptions import ImproperlyConfigured

from openclaw_site.secret_key import read_or_create_secret_key

BASE_DIR = Path(__file__).resolve().parent.parent

env = environ.Env()
environ.Env.read_env(BASE_DIR / ".env")

DEBUG: bool = env.bool("DEBUG", default=False)
SECRET_KEY: str = env.str("SECRET_KEY", default="") or read_or_create_secret_key(
    BASE_DIR / ".secret_key"
)
SECRET_KEY_FALLBACKS: list[str] = env.list("SECRET_KEY_FALLBACKS", default=[])
ALLOWED_HOSTS: list[str] = env.list("ALLOWED_HOSTS", default=["localhost", "127.0.0.1", "[::1]"])
CSRF_TRUSTED_ORIGINS: list[str] = env.list("CSRF_TRUSTED_ORIGINS", default=[])
# Addresses or networks of reverse proxies whose X-Forwarded-* headers are believed.
TRUSTED_PROXIES: list[str] = env.list("TRUSTED_PROXIES", default=[])

OPENCLAW_GATEWAY_TOKEN: str = env.str("OPENCLAW_GATEWAY_TOKEN", default="")
OPENCLAW_HOOKS_TOKEN: str = env.str("OPENCLAW_HOOKS_TOKEN", default="")
# None leaves it to `manage.py gateway`.
OPENCLAW_ONE_CORE: bool | None = env.bool("OPENCLAW_ONE_CORE", default=None)

# Modules to import for the transforms that they register; see hooks/transforms.py.
HOOK_TRANSFORMS: list[str] = env.list("HOOK_TRANSFORMS", default=[])

# The environment variables that may hold an agent's key: an agent names one of them, and whoever
# may change agents in the admin can have its content sent to a URL of their choice.
AGENT_KEY_VARIABLES: list[str] = env.list(
    "AGENT_KEY_VARIABLES", default=["OPENAI_API_KEY", "OPENCLAW_UPSTREAM_TOKEN"]
)

# How long a heartbeat survives the silence of its process; then another process takes it over.
HEARTBEAT_LEASE_SECONDS: float = env.float("HEARTBEAT_LEASE_SECONDS", default=15.0)

# Whether anybody may read /metrics; else a gateway token or the staff.
METRICS_PUBLIC: bool = env.bool("METRICS_PUBLIC", default=False)

INSTALLED_APPS = [
    # Before the apps whose templates and commands (runserver) they replace.
    "wake",
    "hooks",
    "unfold",
    "unfold.contrib.filters",
    # Not the one that finds the pages by itself: openclaw_site.urls does, so that a command line
    # that shows no page starts without them.
    "django.contrib.admin.apps.SimpleAdminConfig",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "csp",
    "channels",
    "rest_framework",
    "drf_spectacular",
    "drf_spectacular_sidecar",
]

MIDDLEWARE = [
    # First: they are on every answer, whoever gives it.
    "openclaw_site.middleware.ContentSecurityPolicy",
    "django.middleware.security.SecurityMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "openclaw_site.middleware.refuse_nul",
    # Before all that reads the database or the Host.
    "wake.probes.answer_probes",
    "hooks.hosts.refuse_unknown_host",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]

ROOT_URLCONF = "openclaw_site.urls"
ASGI_APPLICATION = "openclaw_site.asgi.application"

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]

DATABASES = {"default": env.db_url("DATABASE_URL", default=f"sqlite:///{BASE_DIR / 'db.sqlite3'}")}
if DATABASES["default"]["ENGINE"] == "django.db.backends.sqlite3":
    # Django's own, with the writers of a process in a row.
    DATABASES["default"]["ENGINE"] = "wake.sqlite"
    DATABASES["default"]["OPTIONS"] = {
        # A writer takes the write lock when its transaction begins, so that two writers wait for
        # each other instead of failing half-way.
        "transaction_mode": "IMMEDIATE",
        "timeout": 10,
        # WAL lets readers and the one writer work side by side; FULL makes a commit survive a
        # power cut, which is what an acknowledged event promises.
        # Pages are half as large as usual (in a database that is made now): what a wake changes
        # lies in many, and a commit writes each whole. After 16 MiB, not 4, they move from the log
        # to their places: those of many sessions are written again and again.
        "init_command": (
            "PRAGMA page_size=2048; PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; "
            "PRAGMA wal_autocheckpoint=8000;"
        ),
    }
    # A file, not memory: the tests open it from several threads and processes.
    DATABASES["default"]["TEST"] = {
        "NAME": env.str("TEST_DATABASE", default=str(BASE_DIR / "test.sqlite3"))
    }
else:
    DATABASES["default"]["CONN_HEALTH_CHECKS"] = True
    # A server that hangs, or a process that is frozen inside a transaction, must not hang others.
    DATABASES["default"]["OPTIONS"] = {
        "connect_timeout": 10,
        "tcp_user_timeout": 15_000,
        # psycopg's own. Django's is None, with which nothing is prepared, not even on request.
        "prepare_threshold": 5,
        # What is prepared is planned once: that takes longer than most of it.
        "options": (
            "-c lock_timeout=5s -c idle_in_transaction_session_timeout=10s "
            "-c plan_cache_mode=force_generic_plan"
        ),
        **DATABASES["default"].get("OPTIONS", {}),
    }

REDIS_URL: str = env.str("REDIS_URL", default="")
CHANNEL_LAYERS = {
    "default": (
        {
            "BACKEND": "channels_redis.core.RedisChannelLayer",
            # A read waits up to five seconds for a message. The client's own limit must be longer,
            # or every quiet connection ends.
            "CONFIG": {"hosts": [{"address": REDIS_URL, "socket_timeout": 15}]},
        }
        if REDIS_URL
        else {"BACKEND": "channels.layers.InMemoryChannelLayer"}
    )
}

AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator"},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
]
LOGIN_URL = "admin:login"
LOGIN_REDIRECT_URL = "console"

LANGUAGE_CODE = "en"
TIME_ZONE = "UTC"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

STATIC_URL = "static/"
# Static files are served from the packages themselves: one command less before the first start.
WHITENOISE_USE_FINDERS = True
WHITENOISE_AUTOREFRESH = DEBUG

SESSION_COOKIE_HTTPONLY = True
SESSION_COOKIE_SAMESITE = "Lax"
# Behind a proxy, people come over HTTPS; cookies then never travel without it.
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = env.bool(
    "SECURE_COOKIES", default=bool(TRUSTED_PROXIES)
)
SECURE_CONTENT_TYPE_NOSNIFF = True
SILENCED_SYSTEM_CHECKS = [
    # The proxy speaks TLS; it sends people to HTTPS and tells their browsers to stay there.
    "security.W004",
    "security.W008",
    # wake.W002 says the same of both cookies, and which variables to set.
    "security.W012",
    "security.W016",
]
X_FRAME_OPTIONS = "DENY"

# Everything comes from this site, and nothing is written into a page that a browser would run.
# Where a page needs more, it says so: the admin in openclaw_site/middleware.py, the description of
# the HTTP door in hooks/schema.py.
CONTENT_SECURITY_POLICY: dict[str, Any] = {
    "DIRECTIVES": {
        "default-src": [NONE],
        "script-src": [SELF],
        "style-src": [SELF],
        "img-src": [SELF, "data:"],
        "font-src": [SELF],
        "connect-src": [SELF],
        "form-action": [SELF],
        "frame-ancestors": [NONE],
        "base-uri": [NONE],
    }
}

REST_FRAMEWORK: dict[str, Any] = {
    "DEFAULT_AUTHENTICATION_CLASSES": [],
    "DEFAULT_PERMISSION_CLASSES": [],
    "UNAUTHENTICATED_USER": None,
}

# The description of the HTTP door at /api/. What it says is written in hooks/schema.py.
SPECTACULAR_SETTINGS: dict[str, Any] = {
    "TITLE": "OpenClaw wake gateway",
    "OAS_VERSION": "3.1.0",
    "SERVE_INCLUDE_SCHEMA": False,
    "PREPROCESSING_HOOKS": ["hooks.schema.leave_out_views"],
    "POSTPROCESSING_HOOKS": ["hooks.schema.describe_hooks"],
    "SORT_OPERATIONS": False,
    # Nothing on the page comes from elsewhere, or asks elsewhere whether the description is valid.
    "SWAGGER_UI_DIST": "SIDECAR",
    "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
    "SWAGGER_UI_SETTINGS": {"deepLinking": True, "validatorUrl": None},
    # It does not depend on the deployment; a test validates it.
    "ENABLE_DJANGO_DEPLOY_CHECK": False,
}

LOG_FORMAT: str = env.str("LOG_FORMAT", default="line")
if LOG_FORMAT not in ("line", "json"):
    raise ImproperlyConfigured(f"LOG_FORMAT takes line or json, not {LOG_FORMAT!a}")
# What Python warns of is a line like all others then.
logging.captureWarnings(LOG_FORMAT == "json")
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "line": {"()": "wake.logs.LineFormatter"},
        "json": {"()": "wake.logs.JsonFormatter"},
    },
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": LOG_FORMAT}},
    "root": {"handlers": ["stderr"], "level": env.str("LOG_LEVEL", default="INFO")},
    "loggers": {"httpx": {"level": "WARNING"}},
}

UNFOLD: dict[str, Any] = {
    "SITE_TITLE": "OpenClaw wake gateway",
    "SITE_HEADER": "OpenClaw wake gateway",
    "SITE_SYMBOL": "notifications_active",
    "SITE_FAVICONS": [
        {"rel": "icon", "type": "image/svg+xml", "href": "openclaw_site.navigation.icon"}
    ],
    "SHOW_VIEW_ON_SITE": False,
    "SHOW_BACK_BUTTON": True,
    "STYLES": ["wake.admin.screens.stylesheet"],
    "DASHBOARD_CALLBACK": "wake.admin.dashboard.dashboard",
    "SIDEBAR": {"navigation": "openclaw_site.navigation.sidebar"},
}
