"""`svb mcp` as agents use it: through the package's own client, over standard input and output and over HTTP."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import jsonschema
import mcp_types
import numpy as np
import pytest
import shown
from conftest import RunSvb
from mcp.client.client import Client
from mcp.client.stdio import StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from PIL import Image
from watching import EVIL

from svb.retrieve.searching.pictures import duration_seconds
from svb.retrieve.searching.results import video_key
from svb.retrieve.server.agent_tools import MAX_RESULTS
from svb.retrieve.stored.cues import Cue, Track, cut_into_windows, publish_speech, speech_of
from svb.retrieve.stored.manifest import commit, read_manifest

SERVER = Path(shown.__file__)
SCHEMA = json.loads((Path(__file__).resolve().parents[1] / "docs" / "answer.schema.json").read_text("utf-8"))
TOKEN = "a-token-of-some-length"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index with subtitles of two of its videos, and a folder of queries and a secret beside it."""
    folder = tmp_path_factory.mktemp("agents")
    out = shown.make_index(folder / "index", shown.make_shown(folder / "videos"))
    lines = [Cue("the boat leaves", 1.0, 2.5), Cue("wind from the west", 12.0, 13.0)]
    lines.append(Cue("<script>alert(1)</script>", 19.0, 19.5))
    tracks = [
        Track("harbour/boat", "a.en.srt", "en", "sidecar", (1, 1), lines),
        Track("tall", "b.srt", "", "sidecar", (1, 1), [Cue("of another video", 1.0, 2.0)]),
    ]
    windows = [cut_into_windows(track.cues) for track in tracks]
    embeddings = np.stack([shown.embed("boat")] * sum(map(len, windows))).astype(np.float16)
    entry = publish_speech(out, speech_of(tracks, embeddings, windows))
    manifest = read_manifest(out)
    del manifest["format_version"]
    commit(out, {**manifest, "speech": [entry]})
    (folder / "queries").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "queries" / "red.png")
    (folder / "secret.png").write_bytes(b"secret")
    (folder / "queries" / "link.png").symlink_to(folder / "secret.png")
    return out


def talk(index: Path, clips: Path | None, ask: Callable[[Client], Awaitable[Any]], *more: str) -> Any:
    """Have a client talk with a server that it starts, as agents do."""
    arguments = [str(SERVER), "mcp", "--index", str(index), *more]
    arguments += [] if clips is None else ["--clips", str(clips)]

    async def run() -> Any:
        async with Client(StdioServerParameters(command=sys.executable, args=arguments)) as client:
            return await ask(client)

    return asyncio.run(asyncio.wait_for(run(), 1200))


def value_of(result: mcp_types.CallToolResult) -> dict[str, Any]:
    first = result.content[0]
    assert isinstance(first, mcp_types.TextContent)
    assert not result.is_error, first.text
    held: dict[str, Any] = json.loads(first.text)
    assert held == result.structured_content
    return held


def pictures_of(result: mcp_types.CallToolResult) -> list[Image.Image]:
    contents = [each for each in result.content if isinstance(each, mcp_types.ImageContent)]
    assert all(each.mime_type == "image/jpeg" for each in contents)
    return [Image.open(io.BytesIO(base64.b64decode(each.data))) for each in contents]


def test_an_agent_searches_looks_reads_and_cuts_and_no_more(index: Path, tmp_path: Path) -> None:
    async def ask(client: Client) -> None:
        async def use(tool: str, **arguments: Any) -> dict[str, Any]:
            return value_of(await client.call_tool(tool, arguments))

        await assert_refused(client)
        assert list((tmp_path / "clips").iterdir()) == []
        assert client.instructions is not None and "video_id" in client.instructions
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == {
            *("search", "search_file", "describe_index", "list_videos", "look", "read_said", "cut_clip")
        }
        for name, tool in tools.items():
            assert tool.annotations is not None and tool.annotations.read_only_hint == (name != "cut_clip")
            assert not {"oneOf", "anyOf", "allOf"} & {*tool.input_schema}  # which some clients refuse
        held = await use("describe_index")
        assert (held["num_videos"], held["query_files"]) == (45, ["red.png"])
        listed = await use("list_videos", folder="other", begin=30, count=5)
        assert (listed["num_videos"], listed["next_begin"]) == (40, 35)
        assert [video["video_id"] for video in listed["videos"]] == [f"other/{n}" for n in range(30, 35)]
        answer = await use("search", text="a boat", k=2)
        jsonschema.validate(answer, SCHEMA)
        best = answer["results"][0]
        assert [result["video_id"] for result in answer["results"]] == ["harbour/boat", EVIL]
        assert len((await use("search", like="harbour/boat", plus=None, k=3))["results"]) == 3
        content = base64.b64encode((index.parent / "queries" / "red.png").read_bytes()).decode()
        for file in ({"name": "red.png"}, {"content_base64": content, "kind": "video", "span_seconds": [0, 1]}):
            answer = await use("search_file", **file, k=1)
            jsonschema.validate(answer, SCHEMA)
            assert answer["results"][0]["video_id"] == "harbour/boat"
        span = {name: best["moments"][0][name] for name in ("begin_seconds", "end_seconds")}
        for named in (best["video_id"], best["key"]):
            looked = await client.call_tool("look", {"video_id": named, **span, "frames": 4})
            poster, strip = pictures_of(looked)
            assert poster.size == (160, 120) and strip.size == (960, 180)
            assert value_of(looked)["picture_seconds"] == span["begin_seconds"]
            assert len(value_of(looked)["strip_seconds"]) == 4
        assert len(pictures_of(await client.call_tool("look", {"video_id": "tall", "begin_seconds": 3}))) == 1
        said = await use("read_said", video_id="harbour/boat", seconds=13, around_seconds=6)
        wind = {"text": "wind from the west", "begin_seconds": 12.0, "end_seconds": 13.0}
        assert said["lines"] == [{**wind, "language": "en", "source": "sidecar"}]
        assert len((await use("read_said", video_id="harbour/boat", seconds=9))["lines"]) == 3
        for _ in range(2):  # the second time it is there
            cut = await use("cut_clip", video_id="harbour/boat", begin_seconds=2, end_seconds=3.5)
            assert cut["clip"] == f"harbour_boat-{video_key('harbour/boat')[:6]}-2.000-3.500.mp4"
        assert duration_seconds(tmp_path / "clips" / cut["clip"]) == pytest.approx(1.5, abs=0.11)

    talk(index, tmp_path / "clips", ask, "--queries", str(index.parent / "queries"))


SPAN = {"begin_seconds": 1, "end_seconds": 2}
REFUSED: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("search", {"text": "boat", "k": 10_000}, f"k is 10000 - expected 1 to {MAX_RESULTS}"),
    ("search", {"text": "boat", "plus": ["x"] * 101}, "plus has 101 entries"),
    ("search", {"image": "/etc/passwd"}, "unknown argument image"),
    ("search", {"like": "../../etc/passwd"}, "the index has no video '../../etc/passwd'"),
    ("search", {}, "the query is empty"),
    ("search", {"text": ["boat"]}, "expected str"),
    ("search_file", {"name": "../secret.png"}, "'../secret.png' is not a file in the folder of queries"),
    ("search_file", {"name": ".."}, "'..' is not a file in the folder"),
    ("search_file", {"name": "link.png"}, "'link.png' is not a file in the folder"),
    ("search_file", {"name": "/etc/passwd"}, "is not a file in the folder"),
    ("search_file", {"content_base64": "???"}, "content_base64 is not base64"),
    ("search_file", {}, "expected either name or content_base64"),
    ("search_file", {"name": "red.png", "kind": "text"}, "expected one of image, video"),
    ("look", {"video_id": "../videos/tall.mp4", "begin_seconds": 1}, "the index has no video"),
    ("look", {"video_id": "tall", "begin_seconds": "1"}, "begin_seconds is '1' - expected a value of type number"),
    ("look", {"video_id": "tall", **SPAN, "frames": 10_000}, "expected 1 to 24"),
    ("look", {"video_id": "gone", "begin_seconds": 1}, "gone.mp4 is gone"),
    ("look", {"video_id": "tall"}, "begin_seconds is missing"),
    ("read_said", {"video_id": "tall", "seconds": -1}, "expected 0 to"),
    ("list_videos", {"count": 10_000}, "count is 10000"),
    ("cut_clip", {"video_id": "../tall", **SPAN}, "the index has no video"),
    ("cut_clip", {"video_id": "tall", "begin_seconds": 2, "end_seconds": 1}, "expected 0 <= begin < end"),
    ("cut_clip", {"video_id": "tall", "begin_seconds": 0, "end_seconds": 1e6}, "at most 600 s"),
    ("cut_clip", {"video_id": "tall", **SPAN, "folder": "/tmp"}, "unknown argument folder"),
    ("delete", {}, "there is no tool 'delete'"),
)


async def assert_refused(client: Client) -> None:
    """Ask for what an agent must not or cannot have."""
    for name, arguments, words in REFUSED:
        # Not by the client, which also knows the tools.
        result = await client.session.call_tool(name, arguments)
        assert result.is_error and words in result.content[0].text, (name, arguments, result)


def test_without_folders_nothing_can_be_cut_nor_kept(index: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(index, tmp_path / "index"))
    shutil.rmtree(copied / "cache", ignore_errors=True)
    (copied / "cache").write_text("a file where the folder should be")

    async def ask(client: Client) -> None:
        looked = await client.call_tool("look", {"video_id": "tall", "begin_seconds": 1})
        assert len(pictures_of(looked)) == 1
        assert "cut_clip" not in [tool.name for tool in (await client.list_tools()).tools]
        assert (await client.session.call_tool("cut_clip", {"video_id": "tall", **SPAN})).is_error
        result = await client.session.call_tool("search_file", {"name": "red.png"})
        assert "--queries" in result.content[0].text

    talk(copied, None, ask)


def line(number: int, method: str, **parameters: Any) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": number, "method": method, "params": parameters}).encode() + b"\n"


@pytest.mark.parametrize("leaves", ["closes", "sigterm"])
def test_a_client_that_goes_away_ends_the_server_and_its_work(index: Path, leaves: str) -> None:
    """It leaves while a frame is being decoded; a line that is no message has not ended the talk before."""
    command = [sys.executable, str(SERVER), "mcp", "--index", str(index)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as server:
        assert server.stdin is not None and server.stdout is not None and server.stderr is not None
        about = {"clientInfo": {"name": "test", "version": "1"}, "capabilities": {}}
        server.stdin.write(b"no message\n" + line(1, "initialize", **about, protocolVersion="2025-06-18"))
        server.stdin.write(b'{"jsonrpc": "2.0", "method": "notifications/initialized"}\n')
        server.stdin.write(line(2, "tools/call", name="look", arguments={"video_id": "tall", "begin_seconds": 1}))
        server.stdin.flush()
        while b'"id":2' not in server.stdout.readline():
            pass
        workers = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        assert workers
        server.stdin.write(line(3, "tools/call", name="look", arguments={"video_id": "tall", "begin_seconds": 2}))
        server.stdin.flush()
        if leaves == "closes":
            server.stdin.close()
        else:
            server.send_signal(signal.SIGTERM)
        server.wait(600)
        assert server.returncode == (0 if leaves == "closes" else 128 + signal.SIGTERM)
        assert b"Traceback" not in server.stderr.read()
        assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


@pytest.mark.slow
def test_over_http_the_rules_are_those_of_serve(index: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    command = [sys.executable, str(SERVER), "mcp", "--index", str(index), "--http", "--port", "0"]
    command += ["--token-file", str(tmp_path / "token")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            match = re.search(r"http://\S+/mcp", server.stderr.readline())
            assert match is not None
            url, token = match[0], {"authorization": f"Bearer {TOKEN}"}
            accepts = {"accept": "application/json, text/event-stream"}
            for status, headers in (
                (401, {}),
                (401, {"authorization": "Bearer wrong"}),
                (403, {**token, "host": "evil.example"}),
                (403, {**token, "origin": "http://evil.example"}),
            ):
                assert httpx2.post(url, json={}, headers={**accepts, **headers}).status_code == status

            async def run() -> None:
                async with (
                    httpx2.AsyncClient(headers=token) as http,
                    Client(streamable_http_client(url, http_client=http)) as client,
                ):
                    answer = value_of(await client.call_tool("search", {"text": "a boat"}))
                    assert answer["results"][0]["video_id"] == "harbour/boat"

            asyncio.run(asyncio.wait_for(run(), 120))
            server.send_signal(signal.SIGTERM)
            assert server.wait(600) == 0
        finally:
            server.kill()


def test_what_cannot_be_opened_is_said_in_a_line(
    index: Path, tmp_path: Path, run_svb: RunSvb, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for words, arguments in (
        ("svb index", ("--index", tmp_path / "none")),
        ("is not a folder", ("--index", index, "--queries", tmp_path / "none")),
        ("cannot be made", ("--index", index, "--clips", tmp_path / "file" / "clips")),
    ):
        ran = run_svb("mcp", *arguments)
        assert (ran.exit_code, ran.stdout, words in ran.stderr) == (1, "", True), ran.stderr
        assert ran.stderr.count("\n") == 1
    monkeypatch.setitem(sys.modules, "mcp_types", None)
    monkeypatch.delitem(sys.modules, "svb.retrieve.mcp", raising=False)
    ran = run_svb("mcp", "--index", index)
    assert ran.exit_code == 1 and "pip install 'svb-video[mcp]'" in ran.stderr
