"""The way in: a form for the token."""

from __future__ import annotations

import html
import re
import secrets
from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from svb.retrieve.server.access import SESSION_SECONDS, Access
from svb.retrieve.server.http import read_body
from svb.retrieve.server.policy import content_security_policy

MAX_FORM_BYTES = 1 << 14

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>svb: token</title>
<style nonce="@nonce@">
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { display: grid; place-items: center; min-height: 90vh; margin: 0 1rem; }
form { display: grid; gap: .75rem; width: min(24rem, 100%); }
input, button { font: inherit; padding: .6rem .8rem; border-radius: .5rem; border: 1px solid #8888; }
p { margin: 0; }
</style>
<form method="post" action="/login">
<label for="token">This server asks for its token: <code>svb serve</code> printed it, or its token file has it.
</label>
<input id="token" name="token" type="password" autocomplete="current-password" required autofocus>
<input type="hidden" name="query" value="@query@">
<button>Go on</button>
<p role="alert">@problem@</p>
</form>
<script nonce="@nonce@">document.forms[0].action += location.hash;</script>
</html>
"""


def login_page(status: int, query: str = "", problem: str = "") -> Response:
    """Return the form; `query` is the query string of the page to go to after it."""
    nonce = secrets.token_urlsafe(16)
    page = _PAGE.replace("@nonce@", nonce).replace("@problem@", html.escape(problem))
    headers = {"content-security-policy": content_security_policy(nonce)}
    return HTMLResponse(page.replace("@query@", html.escape(query)), status, headers)


def login_routes(access: Access) -> APIRouter:
    """Return the form and what it posts to."""
    router = APIRouter(include_in_schema=False)

    @router.get("/login")
    async def form() -> Response:
        return login_page(200) if access.token else RedirectResponse("/", 303)

    @router.post("/login")
    async def log_in(request: Request) -> Response:
        fields = parse_qs((await read_body(request, MAX_FORM_BYTES)).decode("utf-8", "replace"))
        query = re.sub(r"[^!-~]", "", fields.get("query", [""])[0])
        if not access.is_token(fields.get("token", [""])[0].strip()):
            return login_page(401, query, "That is not the token.")
        # Always to the page: an address from the form could lead anywhere.
        response = RedirectResponse(f"/?{query}" if query else "/", 303)
        response.set_cookie(
            access.cookie, access.new_session(), max_age=SESSION_SECONDS, httponly=True, samesite="strict"
        )
        return response

    return router
