"""What the routes share: JSON answers, protective headers, bodies with a limit, work that ends with its client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from typing import Any, TypeVar

from fastapi import HTTPException, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive

from svb.errors import InputError, SvbError, UsageError

T = TypeVar("T")

# A request takes a few hundred bytes, or a few thousand if it lists many folders.
MAX_JSON_BYTES = 1 << 18
# A head, or a body that is not an upload, fits into a few packets: a slower client blocks a connection.
RECEIVE_SECONDS = 30.0


class BusyError(SvbError):
    """The server has too much work at once; the same request succeeds later."""


class TookTooLongError(SvbError):
    """Work reached its time limit and was ended."""


def content_security_policy(nonce: str | None = None) -> str:
    """Return a policy that allows nothing from elsewhere, and only the script and style that carry the nonce."""
    inline = f" script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}';" if nonce else ""
    return (
        f"default-src 'none';{inline} img-src 'self' data: blob:; media-src 'self' blob:; connect-src 'self'; "
        "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    )


SECURITY_HEADERS = {
    "content-security-policy": content_security_policy(),
    "x-content-type-options": "nosniff",
    # Not no-referrer: browsers would then send the login form with the origin null.
    "referrer-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
}


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return JSON in ASCII: the names of files may not be valid Unicode."""
    return Response(json.dumps(value, allow_nan=False), status, headers, "application/json")


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """Return an error in the form that every route sends."""
    return json_response({"error": message}, status, headers)


def response_to(error: SvbError) -> Response:
    """Return the answer to one of svb's own errors."""
    if isinstance(error, (BusyError, TookTooLongError)):
        return error_response(503, str(error), {"Retry-After": "1"})
    if isinstance(error, (InputError, UsageError)):
        return error_response(400, str(error))
    return error_response(503, str(error))  # the index or its model is damaged


async def read_json(request: Request) -> dict[str, Any]:
    """Return a request's JSON object.

    Raises:
        HTTPException: 413, it is too large; 408, it did not arrive in time; 415, its content type is not JSON; 400,
            it is not a JSON object.
    """
    # A form on another site can send text/plain without asking, but not application/json.
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "expected the content type application/json")
    return parse_object(await read_body(request, MAX_JSON_BYTES))


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Return a request's body.

    Raises:
        HTTPException: 413, it is too large; 408, it did not arrive in time.
    """
    try:
        return await asyncio.wait_for(_read(request, max_bytes), RECEIVE_SECONDS)
    except asyncio.TimeoutError:
        raise HTTPException(
            408, f"the request did not arrive within {RECEIVE_SECONDS:g} s", {"Connection": "close"}
        ) from None


async def _read(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > max_bytes:
            raise HTTPException(413, f"the request is larger than {max_bytes} bytes", {"Connection": "close"})
    return bytes(body)


def parse_object(text: bytes | str) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        HTTPException: 400, the text is not one.
    """
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the request is not valid JSON ({error}) - expected an object") from None
    if not isinstance(parsed, dict):
        raise HTTPException(400, f"the request is a JSON {type(parsed).__name__} - expected an object")
    return parsed


async def until_hung_up(request: Request, work: Awaitable[T]) -> T:
    """Return what work returns; cancel it when the client hangs up.

    Only for use after the request's body has been read.

    Raises:
        ClientDisconnect: The client hung up.
    """
    working = asyncio.ensure_future(work)
    hanging_up = asyncio.ensure_future(_wait_for_hang_up(request.receive))
    try:
        await asyncio.wait({working, hanging_up}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        hanging_up.cancel()
        await asyncio.gather(working, hanging_up, return_exceptions=True)


async def _wait_for_hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
