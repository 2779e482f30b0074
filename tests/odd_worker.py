"""A worker of the server for tests: it embeds without a model, and hangs or dies where a file says so.

It adds the name of each task to the file `ODD_WORKER_LOG`; it embeds a file of `hold` when that says `release`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from svb.errors import InputError
from svb.retrieve.server import worker


def log() -> Path:
    return Path(os.environ["ODD_WORKER_LOG"])


def embed(index: str, request: dict[str, Any], device: str, max_seconds: float) -> dict[str, Any]:
    path = Path(request.get("image") or request["video"])
    content = path.read_bytes()
    while content == b"hold" and "release" not in log().read_text():
        time.sleep(0.01)
    if content == b"hang":
        time.sleep(1000)
    if content == b"die":
        os._exit(1)
    if content == b"noise":
        raise InputError(f"{path} is no picture")
    note(f"embedded {path} {content.decode()} {request}")
    took = {"embed": 3.0, "load": 2.0}
    fingerprint = "another" if content == b"another" else "fake"
    return {"embedding": [1.0, 0.0], "model_fingerprint": fingerprint, "elapsed_seconds": took}


def note(line: str) -> None:
    with log().open("a") as file:
        file.write(line + "\n")


def oddly(task: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def do(**arguments: Any) -> Any:
        note(task)
        if task == "poster" and Path(arguments["source"]).stem == "hang":
            time.sleep(1000)
        return function(**arguments)

    return do


if __name__ == "__main__":
    worker.TASKS = {task: oddly(task, do) for task, do in {**worker.TASKS, "embed": embed}.items()}
    worker.main()
