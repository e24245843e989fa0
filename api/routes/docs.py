"""GET /docs: the OpenAPI schema as one plain page, made here: it opens beside a basestation without a network.

Swagger's page, which loads its scripts from a CDN, is at /swagger for who is online.
"""

import base64
import hashlib
from html import escape
from typing import Any

import orjson
from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 54rem; margin: 2rem auto; padding: 0 1rem; color: #1a2430 }
pre, code { background: #f2f4f7; border-radius: 4px } pre { padding: .7em; white-space: pre-wrap }
h2 { border-top: 1px solid #d5dae1; padding-top: 1rem } td { padding: .1rem 1rem .1rem 0; vertical-align: top }
"""


_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_POLICY = f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; frame-ancestors 'none'"
SWAGGER_PATH = "/swagger"
_CDN = "https://cdn.jsdelivr.net"
_SWAGGER_POLICY = (
    f"default-src 'none'; script-src {_CDN} 'unsafe-inline'; style-src {_CDN} 'unsafe-inline'; "
    "img-src https://fastapi.tiangolo.com data:; connect-src 'self'; base-uri 'none'; frame-ancestors 'none'"
)


def add_docs(app: FastAPI) -> None:
    """Serve both pages."""

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(render(app.openapi()), headers={"content-security-policy": _POLICY})

    @app.get(SWAGGER_PATH, include_in_schema=False)
    async def swagger() -> HTMLResponse:
        page = get_swagger_ui_html(openapi_url="/openapi.json", title=app.title)
        page.headers["content-security-policy"] = _SWAGGER_POLICY
        return page


def render(schema: dict[str, Any]) -> str:
    """The page for an OpenAPI schema, all of its text escaped."""
    info = schema["info"]
    operations = [
        _operation(method, path, operation)
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    ]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(info['title'])} API</title>"
        f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style>"
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{escape(info.get('summary', ''))}"
        "<p>For machines: <a href=/openapi.json>/openapi.json</a>. To try requests, when online: "
        f"<a href=/swagger>/swagger</a>.{''.join(operations)}</html>"
    )


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    bodies = operation.get("requestBody", {}).get("content", {})
    answers = "".join(
        f"<tr><td><code>{escape(status)}</code><td>{escape(answer['description'])}"
        f"<td>{escape(', '.join(answer.get('content', {})))}"
        for status, answer in operation["responses"].items()
    )
    description = f"<pre>{escape(operation['description'])}</pre>" if "description" in operation else ""
    body = "".join(f"<p>Body: <code>{escape(name)}</code>{_examples(content)}" for name, content in bodies.items())
    example = "".join(
        _examples(content)
        for status, answer in operation["responses"].items()
        for content in answer.get("content", {}).values()
        if status < "300"
    )
    return (
        f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation.get('summary', ''))}"
        f"{description}{body}<p>Answers:<table>{answers}</table>{example}"
    )


def _examples(content: dict[str, Any]) -> str:
    values = [example["value"] for example in content.get("examples", {}).values()]
    texts = [value if isinstance(value, str) else orjson.dumps(value).decode() for value in values]
    return "".join(f"<pre>{escape(text)}</pre>" for text in texts)
