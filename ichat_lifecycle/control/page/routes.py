"""The page's routes. What is shown is made in render.py."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ichat_lifecycle.control.page.model import DEFAULT_WINDOW
from ichat_lifecycle.control.page.render import Renderer

POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
STATIC_HEADERS = {
    "Cache-Control": "public, max-age=31536000, immutable",
    "X-Content-Type-Options": "nosniff",
}
METHODS = ["GET", "HEAD"]


def add_page(app: FastAPI, renderer: Renderer) -> list[str]:
    """Adds `/`, and below `/page` what it needs; returns those that are for people."""

    async def page(request: Request) -> Response:
        return _html(renderer.page(_window_of(request)))

    async def view(request: Request) -> Response:
        return _html(renderer.view(_window_of(request)))

    async def static(request: Request) -> Response:
        found = renderer.static.files.get(request.path_params["name"])
        if found is None or request.path_params["version"] != renderer.static.version:
            raise HTTPException(404)
        return Response(found.content, media_type=found.media_type, headers=STATIC_HEADERS)

    app.add_api_route("/", page, methods=METHODS, response_model=None, include_in_schema=False)
    # Not for clients: these may change with the page.
    app.add_route("/page/view", view, METHODS, include_in_schema=False)
    app.add_route("/page/static/{version}/{name}", static, METHODS, include_in_schema=False)
    return ["GET /"]


def _window_of(request: Request) -> str:
    return request.query_params.get("window", DEFAULT_WINDOW)


def _html(content: bytes) -> Response:
    return Response(content, media_type="text/html", headers=HEADERS)
