"""What the routes share: JSON answers, bodies with a limit, work that ends when the client hangs up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from typing import Any, TypeVar

from fastapi import HTTPException, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from svb.errors import InputError, SvbError, UsageError
from svb.retrieve.server.byte_ranges import wait_for_hang_up
from svb.retrieve.server.refusals import BusyError, TookTooLongError

T = TypeVar("T")

# A question is a few hundred bytes, one with a long list of folders a few thousand.
MAX_JSON_BYTES = 1 << 18
# A head or a body that is no upload fits into one packet, or a few: whoever takes longer holds up a connection.
RECEIVE_SECONDS = 30.0


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return JSON: in ASCII, for the names of files may be no Unicode."""
    return Response(json.dumps(value, allow_nan=False), status, headers, "application/json")


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """Return an error as every route sends it."""
    return json_response({"error": message}, status, headers)


def response_to(error: SvbError) -> Response:
    """Return the answer to an error of svb's."""
    if isinstance(error, (BusyError, TookTooLongError)):
        return error_response(503, str(error), {"Retry-After": "1"})
    if isinstance(error, (InputError, UsageError)):
        return error_response(400, str(error))
    return error_response(503, str(error))  # the index or its model is not as it should be


async def read_json(request: Request) -> dict[str, Any]:
    """Return a request's JSON object.

    Raises:
        HTTPException: 413, it is too large; 408, it was not there in time; 415, it is not declared as JSON; 400,
            it is none.
    """
    # Another site's form can send text/plain without asking; not application/json.
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "expected the content type application/json")
    return parse_object(await read_body(request, MAX_JSON_BYTES))


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Return a request's body.

    Raises:
        HTTPException: 413, it is too large; 408, it was not there in time.
    """
    try:
        return await asyncio.wait_for(_read(request, max_bytes), RECEIVE_SECONDS)
    except asyncio.TimeoutError:
        raise HTTPException(
            408, f"the request was not there after {RECEIVE_SECONDS:g} s", {"Connection": "close"}
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
        HTTPException: 400, it is none.
    """
    try:
        held = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the request is no JSON ({error}) - expected an object") from None
    if not isinstance(held, dict):
        raise HTTPException(400, f"the request is a JSON {type(held).__name__} - expected an object")
    return held


async def until_hung_up(request: Request, work: Awaitable[T]) -> T:
    """Return what work returns; cancel it when the client hangs up, for nobody would take it.

    Only after the request's body has been read.

    Raises:
        ClientDisconnect: The client hung up.
    """
    working = asyncio.ensure_future(work)
    hanging_up = asyncio.ensure_future(wait_for_hang_up(request.receive))
    try:
        await asyncio.wait({working, hanging_up}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        hanging_up.cancel()
        await asyncio.gather(working, hanging_up, return_exceptions=True)
