"""Handlers of `/openapi.json` and `/docs`: the API for programs, and for people to read and to try out.

What they need is loaded at the first request for it.
"""

import hashlib
import importlib.util
from functools import cache
from http import HTTPStatus
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response

OWN_FILES = Path(__file__).parent / "docs_page"
SWAGGER_PACKAGE = "fastapi_swagger"
SWAGGER_FILES = ("swagger-ui-bundle.js", "swagger-ui.css")
MEDIA_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), display-capture=(), fullscreen=(), geolocation=(), microphone=(), payment=()",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "X-Permitted-Cross-Domain-Policies": "none",
}
"""As the OWASP Secure Headers Project has them, but for what every answer has (`middleware.NO_SNIFFING`) and for
Strict-Transport-Security, which belongs to whatever speaks TLS."""
_FOR_GOOD = "public, max-age=31536000, immutable"


async def openapi(request: Request) -> Response:
    """GET /openapi.json"""
    access_controlled = request.state.access_control is not None
    return Response(await run_in_threadpool(_document, access_controlled), media_type="application/json")


async def page(_: Request) -> Response:
    """GET /docs"""
    content = await run_in_threadpool(html)
    return Response(content, headers={**_HEADERS, "Cache-Control": "no-cache"}, media_type="text/html")


async def file(request: Request) -> Response:
    """GET /docs/{version}/{file}: one of the files that there are, so there is no path to play tricks with."""
    path = files().get(request.path_params["file"])
    if path is None or request.path_params["version"] != await run_in_threadpool(version):
        raise HTTPException(HTTPStatus.NOT_FOUND, "The page has no such file.")
    headers = {**_HEADERS, "Cache-Control": _FOR_GOOD}
    return FileResponse(path, media_type=MEDIA_TYPES[path.suffix], headers=headers)


@cache
def _document(access_controlled: bool) -> bytes:
    from server.openapi import compose

    return compose(access_controlled=access_controlled)


@cache
def html() -> str:
    """The page, which names the files by their version."""
    return (OWN_FILES / "index.html").read_text().replace("{version}", version())


@cache
def files() -> dict[str, Path]:
    """The files by name: our own and Swagger UI's. Its package is not imported, for it would import FastAPI."""
    spec = importlib.util.find_spec(SWAGGER_PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    swagger = Path(spec.origin).parent / "resources"
    return {
        **{name: swagger / name for name in SWAGGER_FILES},
        **{name: OWN_FILES / name for name in ("page.js", "page.css", "icon.svg")},
    }


@cache
def version() -> str:
    """The files' own. Other files have another version, so browsers keep each for good."""
    digest = hashlib.sha256()
    for path in files().values():
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
