"""Every setting, read once from the environment through strict readers (`environment.py`).

docs/settings.md lists the variables for people who run the site.
"""

import os
from pathlib import Path

import django_stubs_ext
from django.core.exceptions import ImproperlyConfigured
from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict

from trainingsite.embedded import addresses, broker_url
from trainingsite.environment import Environment

django_stubs_ext.monkeypatch()  # ModelAdmin[Row] means something at run time too

env = Environment()

BASE_DIR = Path(__file__).resolve().parent.parent
DATA_DIR = env.path("DATA_DIR", BASE_DIR / "var")
_up = addresses(DATA_DIR)  # of the site that is up on this data folder, for commands typed in another window


def _secret_key() -> str:
    """SECRET_KEY, or the one that `manage.py up` made in the data folder on its first start."""
    given = env.text("SECRET_KEY")
    if given:
        return given
    kept = DATA_DIR / "secret-key"
    if kept.is_file():
        return kept.read_text().strip()
    if env.flag("DEBUG", default=False) or not env.text("DATABASE_URL"):
        return "only-for-commands-that-serve-nobody"
    raise ImproperlyConfigured("SECRET_KEY is not set. Give a long random text; `manage.py up` makes one by itself.")


def database(url: str) -> dict[str, str | int | bool | dict[str, str | bool]]:
    """Django's form of a libpq connection address, read by libpq's own reader.

    Raises:
        ImproperlyConfigured: not an address of a PostgreSQL database.
    """
    try:
        parts = {key: str(value) for key, value in conninfo_to_dict(url).items() if value is not None}
    except ProgrammingError as exc:
        raise ImproperlyConfigured(f"DATABASE_URL is not a PostgreSQL address: {exc}".strip()) from exc
    if url and not url.startswith(("postgres://", "postgresql://")):
        raise ImproperlyConfigured(
            "DATABASE_URL does not begin with postgresql://. Only PostgreSQL 15 or later will do."
        )
    options: dict[str, str | bool] = {
        key: value for key, value in parts.items() if key not in {"host", "port", "user", "password", "dbname"}
    }
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": parts.get("dbname", "trainingsite"),
        "USER": parts.get("user", ""),
        "PASSWORD": parts.get("password", ""),
        "HOST": parts.get("host", ""),
        "PORT": parts.get("port", ""),
        "CONN_MAX_AGE": 600,
        "CONN_HEALTH_CHECKS": True,
        "OPTIONS": options,
    }


SECRET_KEY = _secret_key()
DEBUG = env.flag("DEBUG", default=False)
ALLOWED_HOSTS = list(env.words("ALLOWED_HOSTS", ("localhost", "127.0.0.1", "[::1]", "testserver")))
CSRF_TRUSTED_ORIGINS = list(env.words("CSRF_TRUSTED_ORIGINS"))

PORT = env.integer("PORT", int(_up.get("PORT", "8000")), at_least=1, at_most=65535)
GATEWAY_PORT = env.integer("GATEWAY_PORT", int(_up.get("GATEWAY_PORT", PORT + 1)), at_least=1, at_most=65536)

INSTALLED_APPS = [
    "trainingsite.apps.SiteConfig",
    "trajectories.apps.TrajectoriesConfig",
    "training.apps.TrainingConfig",
    "gateway.apps.GatewayConfig",
    "trainingsite.apps.TrainingsiteAdminConfig",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "django.contrib.postgres",
    "django.contrib.humanize",
    "rest_framework",
    "drf_spectacular",
    "django_celery_beat",
    "django_htmx",
]

AUTHENTICATION_BACKENDS = ["trajectories.rights.RolesAlone"]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "trainingsite.security.ContentSecurityPolicyMiddleware",
    "trainingsite.slashes.ApiSlashMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "django_htmx.middleware.HtmxMiddleware",
]

ROOT_URLCONF = "trainingsite.urls"
WSGI_APPLICATION = "trainingsite.wsgi.application"
APPEND_SLASH = True  # for pages; the API does without redirects (slashes.py)

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
            ],
        },
    },
]

DATABASE_URL = env.text("DATABASE_URL", _up.get("DATABASE_URL", "postgresql:///trainingsite"))
DATABASES = {"default": database(DATABASE_URL)}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

REDIS_URL = env.text("REDIS_URL", _up.get("REDIS_URL", "redis://localhost:6379/0"))

AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator", "OPTIONS": {"min_length": 10}},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
]
LOGIN_URL = "admin:login"
SESSION_COOKIE_HTTPONLY = True
SESSION_COOKIE_SAMESITE = "Lax"
SESSION_COOKIE_SECURE = env.flag("HTTPS", default=False)
CSRF_COOKIE_SECURE = SESSION_COOKIE_SECURE
SECURE_CONTENT_TYPE_NOSNIFF = True
SECURE_REFERRER_POLICY = "same-origin"
X_FRAME_OPTIONS = "DENY"

LANGUAGE_CODE = "en-us"
TIME_ZONE = "UTC"
USE_I18N = False
USE_TZ = True

STATIC_URL = "static/"
STATIC_ROOT = DATA_DIR / "static"
STATICFILES_DIRS = [BASE_DIR / "static"]
WHITENOISE_USE_FINDERS = True  # one machine needs no collectstatic; WHITENOISE reads the packages' folders


def storage(name: str, bucket: str) -> dict[str, object]:
    """Where blobs or archived payloads lie: a folder, or an S3 bucket (its keys come from AWS's own variables)."""
    if not bucket:
        return {"BACKEND": "trajectories.durable_files.DurableFiles", "OPTIONS": {"location": DATA_DIR / name}}
    options = {"bucket_name": bucket, "location": name, "file_overwrite": False, "default_acl": None}
    for option, variable in (("endpoint_url", "S3_ENDPOINT_URL"), ("region_name", "S3_REGION")):
        if given := env.text(variable):
            options[option] = given
    return {"BACKEND": "storages.backends.s3.S3Storage", "OPTIONS": options}


S3_BUCKET = env.text("S3_BUCKET")
STORAGES = {
    "default": storage("blobs", S3_BUCKET),
    "archive": storage("archive", S3_BUCKET),
    "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
}

# Bodies are read as streams under the published limits (trajectories/limits.py); Django's own 2.5 MB holds for forms.
DATA_UPLOAD_MAX_MEMORY_SIZE = 2_621_440
DATA_UPLOAD_MAX_NUMBER_FIELDS = 5_000

# Pressure (trajectories/pressure.py).
API_REQUESTS_PER_MINUTE = env.integer("API_REQUESTS_PER_MINUTE", 0, at_least=0)  # of a key without its own; 0: any
DISK_FREE_FLOOR_MB = env.integer("DISK_FREE_FLOOR_MB", -1, at_least=0)  # -1: 5 % of the disk, 64 MB to 2 GB
DISK_WATCH = env.words("DISK_WATCH")  # further folders whose disks count, the database's if it is seen from here
DATABASE_MAX_MB = env.integer("DATABASE_MAX_MB", 0, at_least=0)  # of a database elsewhere; 0: not known

REST_FRAMEWORK = {
    "URL_FORMAT_OVERRIDE": None,  # ?format= is ours
    "DEFAULT_AUTHENTICATION_CLASSES": ["trajectories.auth.ApiKeyAuthentication"],
    "DEFAULT_PERMISSION_CLASSES": ["trajectories.auth.HasScope"],
    "DEFAULT_RENDERER_CLASSES": ["trainingsite.rendering.JSONRenderer"],
    "DEFAULT_PARSER_CLASSES": ["rest_framework.parsers.JSONParser"],
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
    "EXCEPTION_HANDLER": "trainingsite.problems.exception_handler",
    "UNAUTHENTICATED_USER": None,
}
SPECTACULAR_SETTINGS = {
    "TITLE": "Trainingsite",
    "DESCRIPTION": "The control plane between agents that act and models that learn from it.",
    "VERSION": "1",
    "SERVE_PERMISSIONS": ["rest_framework.permissions.AllowAny"],
    "SERVE_AUTHENTICATION": [],
    "POSTPROCESSING_HOOKS": [
        "drf_spectacular.hooks.postprocess_schema_enums",
        "trainingsite.openapi.with_problems",
    ],
}

# Celery. The broker is never a source of truth: rows are the queue, a message is a nudge (celery.py).
CELERY_BROKER_URL = broker_url(REDIS_URL)
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_BROKER_TRANSPORT_OPTIONS = {
    "visibility_timeout": 3600,
    "socket_timeout": 5.0,
    "socket_connect_timeout": 2.0,
    "max_retries": 0,  # without it kombu asks a broker that is away again for six seconds, in a request
    "global_keyprefix": env.text("REDIS_PREFIX", "trainingsite:"),
}
CELERY_TASK_IGNORE_RESULT = True
CELERY_TASK_ACKS_LATE = True
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
CELERY_WORKER_HIJACK_ROOT_LOGGER = False
CELERY_BEAT_SCHEDULER = "django_celery_beat.schedulers:DatabaseScheduler"
CELERY_BEAT_MAX_LOOP_INTERVAL = 5
CELERY_TIMEZONE = "UTC"

# The judge: any OpenAI-compatible endpoint. Without a model there is no LLM judge, and the pages say so.
JUDGE_BASE_URL = env.text("JUDGE_BASE_URL")
JUDGE_MODEL = env.text("JUDGE_MODEL")
JUDGE_API_KEY = env.text("JUDGE_API_KEY")
JUDGE_TIMEOUT_SECONDS = env.number("JUDGE_TIMEOUT_SECONDS", 120.0, at_least=0.1)
JUDGE_DAILY_CALLS = env.integer("JUDGE_DAILY_CALLS", 10_000, at_least=0)

# The trainer: a command that gets the job's folder in place of {job}. Empty: `python -m training.trainer`.
TRAINER_COMMAND = env.words("TRAINER_COMMAND")
TRAINER_STALLED_SECONDS = env.integer("TRAINER_STALLED_SECONDS", 900, at_least=5)
TRAINER_MAX_ATTEMPTS = env.integer("TRAINER_MAX_ATTEMPTS", 3, at_least=1)
TRAINER_LEASE_SECONDS = env.integer("TRAINER_LEASE_SECONDS", 60, at_least=2)
JOBS_DIR = DATA_DIR / "jobs"
ADAPTERS_DIR = env.path("ADAPTERS_DIR", DATA_DIR / "adapters")  # the model server reads it too: a shared folder
MODELS_CACHE = env.path("MODELS_CACHE", DATA_DIR / "models")

# Where tokenizers are looked for, to check recorded token ids; nothing is ever fetched for that.
TOKENIZERS_DIR = env.path("TOKENIZERS_DIR", DATA_DIR / "tokenizers")
HF_CACHE = env.path("HF_HUB_CACHE", env.path("HF_HOME", Path.home() / ".cache" / "huggingface") / "hub")

# The model server: vLLM, or the small one that `manage.py up` starts. Empty: nothing is served.
MODEL_SERVER_URL = env.text("MODEL_SERVER_URL", _up.get("MODEL_SERVER_URL", ""))
MODEL_SERVER_API_KEY = env.text("MODEL_SERVER_API_KEY", _up.get("MODEL_SERVER_API_KEY", ""))
MODEL_SERVER_PUBLIC_URL = env.text("MODEL_SERVER_PUBLIC_URL", MODEL_SERVER_URL)  # what agents are told
MODEL_SERVER_TIMEOUT_SECONDS = env.number("MODEL_SERVER_TIMEOUT_SECONDS", 60.0, at_least=0.1)

# Of the log-probabilities that it gives: "processed" (vLLM: --logprobs-mode processed_logprobs), "raw", or "": unknown.
MODEL_SERVER_LOGPROBS_MODE = env.text("MODEL_SERVER_LOGPROBS_MODE", "processed")

# OTLP. Spans of a trace are put together once it is quiet; its trajectory is sealed when nothing more came for a while.
OTEL_QUIET_SECONDS = env.number("OTEL_QUIET_SECONDS", 2.0, at_least=0.0)
OTEL_IDLE_SECONDS = env.number("OTEL_IDLE_SECONDS", 30.0, at_least=0.0)
OTEL_SEAL_SECONDS = env.number("OTEL_SEAL_SECONDS", 15.0, at_least=0.0)
OTEL_CONVERSATION_SECONDS = env.number("OTEL_CONVERSATION_SECONDS", 1800.0, at_least=0.0)
OTEL_KEEP_DAYS = env.number("OTEL_KEEP_DAYS", 7.0, at_least=0.0)
OTEL_QUARANTINE_DAYS = env.number("OTEL_QUARANTINE_DAYS", 30.0, at_least=0.0)

# The gateway. Versions and their base are asked at the model server; other names at GATEWAY_UPSTREAM_URL, where given.
GATEWAY_URL = env.text("GATEWAY_URL", _up.get("GATEWAY_URL", ""))  # where the site finds it; empty: there is none
GATEWAY_UPSTREAM_URL = env.text("GATEWAY_UPSTREAM_URL")
GATEWAY_UPSTREAM_API_KEY = env.text("GATEWAY_UPSTREAM_API_KEY")
GATEWAY_LOGPROBS_MODE = env.text("GATEWAY_LOGPROBS_MODE")  # of GATEWAY_UPSTREAM_URL
GATEWAY_TIMEOUT_SECONDS = env.number("GATEWAY_TIMEOUT_SECONDS", 600.0, at_least=0.1)
GATEWAY_ROUTE_SECONDS = env.number("GATEWAY_ROUTE_SECONDS", 2.0, at_least=0.0)
GATEWAY_BODY_BYTES = env.integer("GATEWAY_BODY_BYTES", 32 * 1024 * 1024, at_least=1024)
GATEWAY_SPOOL_DIR = env.path("GATEWAY_SPOOL_DIR", DATA_DIR / "gateway-spool")
GATEWAY_SPOOL_BYTES = env.integer("GATEWAY_SPOOL_BYTES", 1024 * 1024 * 1024, at_least=0)
GATEWAY_SPOOL_SYNC = env.flag("GATEWAY_SPOOL_SYNC", default=True)

# A new project's policy, until someone changes it in the admin (training/policies.py).
TRAINING_MIN_TRAJECTORIES = env.integer("TRAINING_MIN_TRAJECTORIES", 1000, at_least=1)
TRAINING_MIN_GROUP_SIZE = env.integer("TRAINING_MIN_GROUP_SIZE", 4, at_least=2)
TRAINING_MIN_SCENARIO_GROUPS = env.integer("TRAINING_MIN_SCENARIO_GROUPS", 10, at_least=1)
TRAINING_DATA_QUALITY_THRESHOLD = env.number("TRAINING_DATA_QUALITY_THRESHOLD", 0.95, at_least=0.0, at_most=1.0)
TRAINING_INTERVAL_HOURS = env.number("TRAINING_INTERVAL_HOURS", 24.0, at_least=0.0)
TRAINING_AUTO_TRIGGER = env.flag("TRAINING_AUTO_TRIGGER", default=True)
TRAINING_BASE_MODEL = env.text("TRAINING_BASE_MODEL", "OpenPipe/Qwen3-14B-Instruct")
TRAINING_MAX_POLICY_AGE = env.integer("TRAINING_MAX_POLICY_AGE", 2, at_least=0)
TRAINING_MAX_DRIFT = env.number("TRAINING_MAX_DRIFT", 0.2, at_least=0.0)

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["console"], "level": env.text("LOG_LEVEL", "INFO")},
    "loggers": {
        "httpx": {"level": "WARNING"},
        "httpcore": {"level": "WARNING"},
        # Three lines for each of a dozen tasks every few seconds, of which none says more than that all is well.
        "celery.beat": {"level": "WARNING"},
        "celery.worker.strategy": {"level": "WARNING"},
        "celery.app.trace": {"level": "WARNING"},
    },
}

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
