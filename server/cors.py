"""Lets pages of other origins call, where the settings name them (the Fetch standard's CORS protocol)."""

from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

METHODS = ("GET", "POST", "PATCH", "DELETE")
REQUEST_HEADERS = ("Authorization", "Content-Type", "Idempotency-Key", "X-Request-ID", "traceparent")
ANSWER_HEADERS = ("Idempotent-Replayed", "Location", "Retry-After", "X-Request-ID")
PREFLIGHT_SECONDS = 600
"""For how long a browser need not ask again."""


def allow_origins(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """The application for pages of these origins too. Without credentials: an API key is no cookie."""
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=METHODS,
        allow_headers=REQUEST_HEADERS,
        expose_headers=ANSWER_HEADERS,
        max_age=PREFLIGHT_SECONDS,
    )
