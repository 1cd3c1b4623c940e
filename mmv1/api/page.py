"""The page at `/`, to try the served model in a browser: one file, which speaks to the same API as every other client.

Its script and its style stand in the file, and the Content-Security-Policy allows those two, by their hashes, and nothing else:
no other script, no other host. Trusted Types are required and there are none, so no text, a model's least of all, can become
markup.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import FastAPI, Response


def content_security_policy(html: str) -> str:
    """What a browser may do with the page `html`: run the script and apply the style that are in it, show pictures that were
    given to it, and ask the server that it came from."""
    hashes = {}
    for element in ("script", "style"):
        (text,) = re.findall(rf"<{element}>(.*?)</{element}>", html, re.DOTALL)
        hashes[element] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


def add_page(app: FastAPI) -> None:
    """Adds `GET /`."""
    html = Path(__file__).with_name("page.html").read_bytes()
    headers = {
        "content-security-policy": content_security_policy(html.decode()),
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(html, media_type="text/html", headers=headers)
