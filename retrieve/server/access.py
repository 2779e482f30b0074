"""Who may ask: a token beyond this machine, and on it no page of another site."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import time
from pathlib import Path

from starlette.datastructures import Headers

from svb.errors import InputError

SESSION_SECONDS = 7 * 24 * 3600
MIN_TOKEN_LENGTH = 16
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


class Access:
    """Decides over requests.

    Args:
        token: What a client must show; None lets everybody on this machine in.
        is_loopback: Whether the server can be reached from this machine alone.
        port: Its port; cookies know no ports, so the session's name has it.
    """

    def __init__(self, token: str | None, *, is_loopback: bool, port: int) -> None:
        self.token = token
        self.cookie = f"svb_session_{port}"
        self._is_loopback = is_loopback
        self._secret = secrets.token_bytes(32)

    def refuses(self, method: str, headers: Headers) -> str | None:
        """Return why a request comes from where none may come from, or None.

        A name that an attacker's page has had resolve to 127.0.0.1 betrays itself by the Host header; another
        site's form or script by Origin or Sec-Fetch-Site, which pages cannot forge. The port is free: an ssh
        tunnel may end at any.
        """
        host = headers.get("host", "")
        if self._is_loopback and not is_loopback(re.sub(r":\d+$", "", host).lower()):
            return f"the Host header is {host!r} - this server answers to {', '.join(LOOPBACK_NAMES)}"
        origin = headers.get("origin")
        if method not in {"GET", "HEAD"} and origin is not None and origin.split("://")[-1] != host:
            return f"the request comes from a page of {origin} - only the server's own page may send one"
        if headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
            return "the request comes from another site's page"
        return None

    def is_known(self, headers: Headers, cookies: dict[str, str]) -> bool:
        """Tell whether a request shows the token, or a session that `log_in` gave."""
        if self.token is None:
            return True
        scheme, _, shown = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.is_token(shown.strip()):
            return True
        return self._is_session(cookies.get(self.cookie, ""))

    def is_token(self, shown: str) -> bool:
        """Compare with the token, in a time that says nothing of how much of it was right."""
        if self.token is None:
            return True
        return hmac.compare_digest(_digest(shown), _digest(self.token))

    def new_session(self) -> str:
        """Return a cookie's value, good for `SESSION_SECONDS` or until the server ends; it is not the token."""
        end = str(int(time.time()) + SESSION_SECONDS)
        return f"{end}.{self._sign(end)}"

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


def choose_token(host: str, token_file: Path | None) -> tuple[str | None, bool]:
    """Return the token to ask for and whether it was made up just now; None for a server of this machine alone.

    A token file comes before the environment's `SVB_TOKEN`; where neither is, one is made up for an address that
    others can reach.

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
            return (None, False) if is_loopback(host) else (secrets.token_urlsafe(24), True)
    if len(given) < MIN_TOKEN_LENGTH or not re.fullmatch(r"[!-~]+", given):
        raise InputError(
            f"the token in {place} has {len(given)} characters - expected at least {MIN_TOKEN_LENGTH}, "
            "of printable ASCII without spaces; `openssl rand -base64 24` makes one"
        )
    return given, False


def _digest(text: str) -> bytes:
    # Equal lengths: not even the token's length can be told from the time.
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
