"""Who may ask: this machine and whoever shows the token, but no other site's page; and the login form."""

from __future__ import annotations

import hashlib
import hmac
import html
import ipaddress
import os
import re
import secrets
import time
from pathlib import Path
from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from starlette.datastructures import Headers
from starlette.responses import HTMLResponse, RedirectResponse, Response

from svb.errors import InputError
from svb.retrieve.server.http import content_security_policy, error_response, read_body
from svb.retrieve.server.options import PublicUrl

SESSION_SECONDS = 7 * 24 * 3600
MIN_TOKEN_LENGTH = 16
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
MAX_FORM_BYTES = 1 << 14


def no_token_response() -> Response:
    """Return the answer to a client that shows neither a token nor a session."""
    return error_response(
        401,
        "this server needs its token - send it as `Authorization: Bearer TOKEN`",
        {"WWW-Authenticate": "Bearer"},
    )


class Access:
    """Decides who may ask.

    Args:
        token: The token that a client must show; None lets everybody on this machine in.
        is_loopback: Whether the server can be reached from this machine alone.
        port: The server's port. A cookie is sent to every port of a host, so its name holds this one.
        public_url: The address at which a proxy shows the server to others.
    """

    def __init__(
        self, token: str | None, *, is_loopback: bool, port: int, public_url: PublicUrl | None = None
    ) -> None:
        self.token, self.public_url = token, public_url
        self.cookie = f"svb_session_{port}"
        self._is_loopback = is_loopback
        self._about_proxies = "; behind a proxy, start it with --public-url" if public_url is None else ""
        self._secret = secrets.token_bytes(32)

    def problem_with(self, method: str, headers: Headers) -> str | None:
        """Return why a request's origin is refused, or None.

        The Host header betrays an attacker's page whose own name resolves to 127.0.0.1. Origin and Sec-Fetch-Site,
        which pages cannot forge, betray another site's form or script. Any port is fine: an ssh tunnel may end at
        any port. A proxy sends the site's Host or this machine's own, and the site's Origin.
        """
        host, public = headers.get("host", ""), self.public_url
        name = re.sub(r":\d+$", "", host).lower()
        if self._is_loopback and not is_loopback(name) and (public is None or name != public.host):
            names = ", ".join((*LOOPBACK_NAMES, public.host) if public else LOOPBACK_NAMES)
            return f"the Host header is {host!r} - this server answers to {names}{self._about_proxies}"
        origin = headers.get("origin")
        is_own = (
            origin is None or origin.split("://")[-1] == host or (public is not None and origin == public.origin)
        )
        if method not in {"GET", "HEAD"} and not is_own:
            says = f"the request comes from a page of {origin} - only the server's own page may send one"
            return f"{says}{self._about_proxies}"
        if headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
            return "the request comes from another site's page"
        return None

    def known_path(self, path: str) -> str:
        """Return a request's path without the public path, which some proxies remove themselves."""
        public = self.public_url
        if public is None or not public.path or not path.startswith(f"{public.path}/"):
            return path
        return path.removeprefix(public.path)

    def is_known(self, headers: Headers, cookies: dict[str, str]) -> bool:
        """Tell whether a request shows the token, or a session that the login gave."""
        if self.token is None:
            return True
        scheme, _, shown = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.is_token(shown.strip()):
            return True
        return self._is_session(cookies.get(self.cookie, ""))

    def is_token(self, shown: str) -> bool:
        """Compare a text with the token; the time that this takes does not tell how much of the text was right."""
        if self.token is None:
            return True
        return hmac.compare_digest(_digest(shown), _digest(self.token))

    def _new_session(self) -> str:
        """Return a cookie's value, valid for `SESSION_SECONDS` or until the server ends; it is not the token."""
        end = str(int(time.time()) + SESSION_SECONDS)
        return f"{end}.{self._sign(end)}"

    def add_session(self, response: Response, headers: Headers) -> None:
        """Give the client of a request a session, which only the server's own pages can use.

        Through a proxy, the cookie belongs to the public path, and to https alone if the public address is https.
        """
        origin, path, is_https = headers.get("origin"), "/", False
        is_direct = origin == f"http://{headers.get('host', '')}"
        if self.public_url is not None and (origin == self.public_url.origin or not is_direct):
            path, is_https = f"{self.public_url.path}/", self.public_url.origin.startswith("https:")
        response.set_cookie(
            self.cookie,
            self._new_session(),
            max_age=SESSION_SECONDS,
            path=path,
            secure=is_https,
            httponly=True,
            samesite="strict",
        )

    def _is_session(self, value: str) -> bool:
        end, _, signature = value.partition(".")
        is_signed = hmac.compare_digest(_digest(signature), _digest(self._sign(end)))
        return is_signed and int(end) > time.time()

    def _sign(self, end: str) -> str:
        return hmac.new(self._secret, end.encode("utf-8", "replace"), "sha256").hexdigest()


def is_loopback(host: str) -> bool:
    """Tell whether an address to listen at can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def choose_token(
    host: str, token_file: Path | None, public_url: PublicUrl | None = None
) -> tuple[str | None, bool]:
    """Return the token to ask for and whether it was made just now; None if only this machine can connect.

    The token file comes before the environment's `SVB_TOKEN`; if both are missing, a token is made for an address
    that others can reach, by themselves or through a proxy.

    Raises:
        InputError: The file cannot be read, or the token is too short or not printable ASCII without spaces.
    """
    if token_file is not None:
        try:
            given, place = token_file.read_text("utf-8").strip(), str(token_file)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the token file {token_file} ({error}) - expected one line") from error
    else:
        given, place = os.environ.get("SVB_TOKEN", "").strip(), "SVB_TOKEN"
        if not given:
            is_private = is_loopback(host) and public_url is None
            return (None, False) if is_private else (secrets.token_urlsafe(24), True)
    if len(given) < MIN_TOKEN_LENGTH or not re.fullmatch(r"[!-~]+", given):
        raise InputError(
            f"the token in {place} has {len(given)} characters - expected at least {MIN_TOKEN_LENGTH} of printable "
            "ASCII without spaces; make one with `openssl rand -base64 24`"
        )
    return given, False


def _digest(text: str) -> bytes:
    # Digests have equal lengths, so the time does not tell the token's length either.
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


_LOGIN_PAGE = """<!doctype html>
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
<form method="post" action="login">
<label for="token">This server needs its token: <code>svb serve</code> printed it, or it is in the token file.
</label>
<input id="token" name="token" type="password" autocomplete="current-password" required autofocus>
<input type="hidden" name="query" value="@query@">
<button>Continue</button>
<p role="alert">@problem@</p>
</form>
<script nonce="@nonce@">document.forms[0].action += location.hash;</script>
</html>
"""


def login_page(status: int, query: str = "", problem: str = "") -> Response:
    """Return the form; `query` is the query string of the page to go to after it."""
    nonce = secrets.token_urlsafe(16)
    page = _LOGIN_PAGE.replace("@nonce@", nonce).replace("@problem@", html.escape(problem))
    headers = {"content-security-policy": content_security_policy(nonce)}
    return HTMLResponse(page.replace("@query@", html.escape(query)), status, headers)


def login_routes(access: Access) -> APIRouter:
    """Return the routes of the form and of what it sends."""
    router = APIRouter(include_in_schema=False)

    @router.get("/login")
    async def form() -> Response:
        return login_page(200) if access.token else RedirectResponse("./", 303)

    @router.post("/login")
    async def log_in(request: Request) -> Response:
        fields = parse_qs((await read_body(request, MAX_FORM_BYTES)).decode("utf-8", "replace"))
        query = re.sub(r"[^!-~]", "", fields.get("query", [""])[0])
        if not access.is_token(fields.get("token", [""])[0].strip()):
            return login_page(401, query, "That is not the token.")
        # The form leads to the page and nowhere else: an address in it could lead anywhere.
        response = RedirectResponse(f"./?{query}" if query else "./", 303)
        access.add_session(response, request.headers)
        return response

    return router
