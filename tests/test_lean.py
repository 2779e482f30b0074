"""The lean environment of the Dockerfile, as lean.sh makes it."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
import test_search_clips
from serving import running
from test_search_clips import World

from svb.retrieve.answer import SearchRequest

world = test_search_clips.world  # a fixture

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "requirements-search.txt"
MAX_BYTES = 600_000_000
# About what Debian and Python take in a slim image.
IMAGE_BYTES = 125_000_000
HEAVY = ("torch", "torchvision", "timm", "open-clip-torch", "tensorboard", "transformers", "pandas", "h5py")


def names_of(lines: str) -> dict[str, str]:
    found = {}
    for line in lines.splitlines():
        match = re.match(r"([A-Za-z0-9_.-]+)(.*)", line.partition(" #")[0].strip())
        if match and not line.startswith("#"):
            found[match[1].lower().replace("_", "-")] = match[2].strip()
    return found


def test_the_lean_requirements_are_those_of_the_package() -> None:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", "utf-8")
    required = names_of(parser["options"]["install_requires"])
    lean = names_of(REQUIREMENTS.read_text("utf-8"))
    assert not {*lean} & {*HEAVY}
    for name, bound in lean.items():  # FAISS for GPUs is of no use there
        assert bound == required[name].partition(" ; ")[0] or bound == required[name] or name == "faiss-cpu"
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    assert "sh /src/lean.sh" in dockerfile


@pytest.mark.slow
def test_a_lean_environment_searches_and_serves(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, environment = tmp_path / "src", tmp_path / "environment"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "__pycache__", "demo", "tests", "docs")
    shutil.copytree(ROOT, source, ignore=ignored)
    subprocess.run(["sh", source / "lean.sh", environment, sys.executable], check=True)
    svb = environment / "bin" / "svb"
    assert not [name for name in HEAVY if list(environment.glob(f"lib/*/site-packages/{name.replace('-', '_')}"))]
    num_bytes = sum(path.lstat().st_size for path in environment.rglob("*") if not path.is_dir())
    assert num_bytes + IMAGE_BYTES < MAX_BYTES, num_bytes
    index = Path(shutil.copytree(world.searcher.path, tmp_path / "index"))
    shutil.rmtree(index / "cache", ignore_errors=True)  # embeddings of texts asked before
    expected = world.searcher.search(SearchRequest(text="a picture of a fractal"))

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(each) for each in (svb, "search", *arguments, "--index", index)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    found = run("a picture of a fractal", "--json", "--otio", "x.fcpxml", "--html", "x.html", "--cut", "clips")
    assert found.returncode == 0, found.stderr
    results = json.loads(found.stdout)["results"]
    assert [result["video_id"] for result in results] == [result.video_id for result in expected.results]
    assert (
        (tmp_path / "x.fcpxml").exists() and (tmp_path / "x.html").exists() and list((tmp_path / "clips").iterdir())
    )
    assert run("--like", "clip1").returncode == 0
    refused = run("--video", world.clip(1))
    assert refused.returncode == 1 and "is not installed" in refused.stderr and "Traceback" not in refused.stderr
    monkeypatch.setenv("SVB_TOKEN", "a-token-of-some-length")
    token = {"authorization": "Bearer a-token-of-some-length"}
    with (
        running(index, "--host", "0.0.0.0", svb=(str(svb),)) as server,
        httpx2.Client(base_url=server.url) as client,
    ):
        assert client.get("/healthz").json() == {"status": "ok"}
        answer = client.post("/api/search", json={"text": "a picture of a fractal"}, headers=token, timeout=600)
        best = answer.json()["results"][0]
        assert best["video_id"] == expected.results[0].video_id
        poster = client.get(f"/poster/{best['key']}?t=1", headers=token, timeout=600)
        assert poster.headers["content-type"] == "image/jpeg"
