"""`svb mcp`: an index -> tools for agents, by the Model Context Protocol over standard streams or HTTP."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import mcp_types
from fastapi import HTTPException
from mcp.server import Server, ServerRequestContext
from mcp.server.stdio import stdio_server
from mcp.server.transport_security import TransportSecuritySettings
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from svb import __version__
from svb.errors import SvbError
from svb.interrupts import deferred_interrupts
from svb.retrieve.search import open_searcher
from svb.retrieve.serve import greeting, listening, make_server
from svb.retrieve.server.access import Access, choose_token, is_loopback, no_token_response
from svb.retrieve.server.agent_tools import MAX_CONTENT_BYTES, AgentTools, Shown
from svb.retrieve.server.http import error_response
from svb.retrieve.server.kept_files import CacheFolder
from svb.retrieve.server.options import McpOptions
from svb.retrieve.server.state import ServerState

logger = logging.getLogger(__name__)

INSTRUCTIONS = """Tools over an index of the user's videos. Search first; look at a moment before you claim what it
shows. Times are exact seconds of each file's own clock. Videos are named by video_id, never by path."""
# Base64 takes a third more, and the message around it a little.
MAX_BODY_BYTES = 2 * MAX_CONTENT_BYTES


def mcp(index: Path | str, options: McpOptions | None = None) -> Path:
    """Open an index to agents until the client leaves or, over HTTP, until SIGINT or SIGTERM.

    Returns:
        The index's folder.

    Raises:
        InputError: There is no index, a folder cannot be used, the port is in use, or the token is not valid.
        StoreError: The index is damaged or has a newer format.
    """
    index, options = Path(index), options or McpOptions()
    cache = CacheFolder(index)
    try:
        state = ServerState(
            index, cache.path, lambda before: open_searcher(index, options.device, previous=before), options.serve
        )
        tools = AgentTools(state, options)
        server = make_agent_server(tools)
        if options.http:
            _serve(server, tools, state, index, options)
        else:
            asyncio.run(_talk(server, tools, state, cache))
    finally:
        cache.close()
    return index


def make_agent_server(tools: AgentTools) -> Server[Any]:
    """Return a server of the protocol that offers the tools."""

    async def list_tools(
        ctx: ServerRequestContext[Any], params: mcp_types.PaginatedRequestParams | None
    ) -> mcp_types.ListToolsResult:
        return mcp_types.ListToolsResult(
            tools=[
                mcp_types.Tool(
                    name=name,
                    description=tool.does,
                    input_schema=tool.parameters,
                    annotations=mcp_types.ToolAnnotations(
                        read_only_hint=tool.reads_only,
                        destructive_hint=False,
                        idempotent_hint=True,
                        open_world_hint=False,
                    ),
                )
                for name, tool in tools.tools.items()
            ]
        )

    async def call_tool(
        ctx: ServerRequestContext[Any], params: mcp_types.CallToolRequestParams
    ) -> mcp_types.CallToolResult:
        try:
            return _result(await tools.call(params.name, params.arguments or {}))
        except SvbError as error:
            problem = str(error)
        except HTTPException as error:
            problem = str(error.detail)
        except Exception:
            logger.exception("the tool %s failed", params.name)
            problem = "internal error; see the log of svb mcp"
        return mcp_types.CallToolResult(content=[mcp_types.TextContent(type="text", text=problem)], is_error=True)

    return Server(
        "svb",
        version=__version__,
        title="svb: search in videos",
        instructions=INSTRUCTIONS,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )


def _result(shown: Shown) -> mcp_types.CallToolResult:
    text = json.dumps(shown.value, ensure_ascii=False, allow_nan=False)
    content: list[mcp_types.ContentBlock] = [mcp_types.TextContent(type="text", text=text)]
    for picture in shown.pictures:
        data = base64.b64encode(picture).decode()
        content.append(mcp_types.ImageContent(type="image", data=data, mime_type="image/jpeg"))
    return mcp_types.CallToolResult(content=content, structured_content=shown.value)


# --- over standard input and output


async def _talk(server: Server[Any], tools: AgentTools, state: ServerState, cache: CacheFolder) -> None:
    """Answer the client on standard input until it leaves; SIGINT or SIGTERM end the process."""
    ending: list[asyncio.Task[None]] = []

    async def end(number: int) -> None:
        await tools.close()
        await state.close()
        cache.close()
        sys.stderr.flush()
        # A thread still waits for a line of the client, and Python would wait for that thread.
        os._exit(128 + number)

    def stop(number: int) -> None:
        ending.append(asyncio.ensure_future(end(number)))

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    try:
        async with stdio_server() as (read, write):
            await server.run(read, write, server.create_initialization_options())
    finally:
        await tools.close()
        await state.close()


# --- over HTTP


def _serve(server: Server[Any], tools: AgentTools, state: ServerState, index: Path, options: McpOptions) -> None:
    shared = options.serve
    token, is_new = choose_token(options.host, options.token_file, shared.public)
    with listening(options.host, options.port) as listener, deferred_interrupts() as interrupted:
        port = listener.getsockname()[1]
        access = Access(token, is_loopback=is_loopback(options.host), port=port, public_url=shared.public)
        app = server.streamable_http_app(
            json_response=True,
            stateless_http=True,  # a client that goes away leaves nothing behind
            max_request_body_size=MAX_BODY_BYTES,
            # `_guarded` checks the Host header.
            transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),
        )
        for line in greeting(port, index, token, is_new=is_new, options=shared, path="/mcp"):
            logger.info(line)
        web = make_server(_guarded(app, access))

        async def run() -> None:
            try:
                async with server.session_manager.run():
                    await web.serve(sockets=[listener])
            finally:
                await tools.close()
                await state.close()

        if not interrupted():
            asyncio.run(run())


def _guarded(app: ASGIApp, access: Access) -> ASGIApp:
    """Return an application that answers only who may ask, by the rules of `svb serve`."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        problem = access.problem_with(scope["method"], headers)
        if problem is not None:
            return await error_response(403, problem)(scope, receive, send)
        if not access.is_known(headers, {}):
            return await no_token_response()(scope, receive, send)
        await app({**scope, "path": access.known_path(scope["path"])}, receive, send)

    return answer
