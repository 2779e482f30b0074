"""`svb serve` behind a real nginx, set up as docs/search.md says and in the other ways that people set it up."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import serving as s
import shown
import watching as w
from conftest import RunSvb

DOCUMENT = Path(__file__).parent.parent / "docs" / "search.md"
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin")
TOKEN = "0123456789abcdef-token"
# Chromium finds it on this machine, and for svb it is the name of another one.
HOST = "videos.localhost"
# By name: the public path, and what stands in nginx's `server` block.
SETUPS = {
    "documented": ("/svb", "DOCUMENTED"),
    "path kept": ("/svb", "location /svb { proxy_pass http://127.0.0.1:8765; proxy_set_header Host $host; }"),
    "site": ("", "location / { proxy_pass http://127.0.0.1:8765; proxy_set_header Host $http_host; }"),
    "site, nginx's defaults": ("", "location / { proxy_pass http://127.0.0.1:8765; }"),
}
NGINX_CONF = """
daemon off; master_process off; pid nginx.pid; error_log nginx.log;
events {{ }}
http {{
    access_log off; gzip on; gzip_types application/json image/jpeg video/mp4; gzip_min_length 1;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate cert.pem; ssl_certificate_key key.pem;
        {site}
    }}
}}
"""


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("proxy")
    return shown.make_index(folder / "index", shown.make_shown(folder / "videos"), num_others=3)


@contextlib.contextmanager
def proxied(index: Path, folder: Path, setup: str) -> Iterator[str]:
    """Run `svb serve` and an nginx in front of it with https; yields the public address."""
    if NGINX is None or shutil.which("openssl") is None:
        pytest.skip("no nginx or no openssl: apt-get install nginx-light openssl")
    path, site = SETUPS[setup]
    if site == "DOCUMENTED":
        (site,) = re.findall(r"^```nginx\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    make_key = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout key.pem -out cert.pem"
    subprocess.run([*make_key.split(), "-subj", f"/CN={HOST}"], cwd=folder, check=True, capture_output=True)
    (folder / "token").write_text(TOKEN)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"https://{HOST}:{port}{path}"

    def is_open() -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    with s.running(index, "--public-url", url, "--token-file", str(folder / "token")) as server:
        assert server.process.stderr is not None
        assert server.process.stderr.readline() == f"through your proxy: {url}/\n"
        site = site.replace("127.0.0.1:8765", f"127.0.0.1:{server.port}")
        (folder / "nginx.conf").write_text(NGINX_CONF.format(port=port, site=site))
        nginx = subprocess.Popen([NGINX, "-p", str(folder), "-c", "nginx.conf", "-e", "nginx.log"])
        try:
            s.until(lambda: nginx.poll() is not None or is_open())
            assert nginx.poll() is None, (folder / "nginx.log").read_text()
            yield f"{url}/"
            assert server.process.poll() is None
            assert server.stop() == (0, "")
        finally:
            nginx.terminate()
            nginx.wait()


def client_of(url: str) -> httpx2.Client:
    """Return a client that sends what a browser sends from the page; it need not resolve the public name."""
    public = httpx2.URL(url)
    headers = {"host": f"{HOST}:{public.port}", "origin": f"https://{HOST}:{public.port}"}
    return httpx2.Client(base_url=url.replace(HOST, "127.0.0.1"), headers=headers, verify=False, timeout=600)


@pytest.mark.parametrize(
    "setup", [name if name == "documented" else pytest.param(name, marks=pytest.mark.slow) for name in SETUPS]
)
def test_the_server_answers_through_nginx(index: Path, tmp_path: Path, setup: str) -> None:
    path = f"{SETUPS[setup][0]}/"
    with proxied(index, tmp_path, setup) as url, client_of(url) as client:
        form = client.get("?q=dogs")
        assert form.status_code == 401 and 'action="login"' in form.text
        assert client.post("api/search", json={"like": "tall"}).status_code == 401
        assert client.post("login", data={"token": "wrong"}).status_code == 401

        right = client.post("login", data={"token": TOKEN, "query": "q=dogs"})
        assert right.status_code == 303
        assert str(httpx2.URL(f"{url}login").join(right.headers["location"])) == f"{url}?q=dogs"
        cookie = right.headers["set-cookie"].split("; ")
        assert {f"Path={path}", "Secure", "HttpOnly", "SameSite=strict"} <= {*cookie}

        client.headers["cookie"] = cookie[0]
        answer = client.post("api/search", json={"like": "tall"})
        assert answer.status_code == 200 and answer.json()["num_videos"] == 7
        sent = {"kind": "image", "request": "{"}
        assert client.post("api/search/file", data=sent, files={"file": ("a.png", b"x")}).status_code == 400
        assert client.post("api/search", json={}, headers={"origin": "https://evil.example"}).status_code == 403

        media = f"media/{s.key_of('tall')}"
        tag = client.get(media, headers={"accept-encoding": "gzip"}).headers["etag"]
        assert tag.startswith("W/")
        assert client.get(media, headers={"if-none-match": tag}).status_code == 304
        part = client.get(media, headers={"range": "bytes=2-5", "accept-encoding": "identity"})
        assert (part.status_code, len(part.content)) == (206, 4)
        assert client.get("openapi.json").json()["servers"] == [{"url": url.rstrip("/")}]
        if path != "/":
            bare = client.get(f"{client.base_url.join('/')}svb?q=a")
            assert bare.status_code in {301, 308} and httpx2.URL(bare.headers["location"]).path == path


@pytest.mark.slow
@pytest.mark.parametrize("setup", ["documented", "site, nginx's defaults"])
def test_the_page_works_through_nginx(index: Path, tmp_path: Path, setup: str) -> None:
    with w.browser() as chromium, proxied(index, tmp_path, setup) as url:
        page = chromium.new_context(ignore_https_errors=True).new_page()
        page.set_default_timeout(600_000)
        problems = w.watch(page, lambda sent: sent.startswith((url, "data:")))
        page.goto(f"{url}?like=tall")
        page.get_by_label("This server needs its token").fill(TOKEN)
        page.keyboard.press("Enter")
        page.wait_for_selector(".card")
        assert page.url == f"{url}?like=tall"
        w.until(page, "[...document.querySelectorAll('.poster img')].some(image => image.naturalWidth > 0)")
        page.locator(".card", has=page.get_by_role("heading", name="harbour/boat")).locator(".poster").click()
        w.until(page, "document.querySelector('video')?.readyState >= 2")
        page.get_by_role("link", name="svb").click()
        w.until(page, "document.querySelector('#holdings').textContent.includes('8 videos')")
        assert page.url == url
        # On a busy machine Chromium may give up a picture whose connection nginx has just closed, and asks again.
        harmless = "status of 40[14]|ERR_TOO_MANY_RETRIES"
        assert [problem for problem in problems if not re.search(harmless, problem)] == []


def test_the_public_address_is_answered_too(tmp_path: Path) -> None:
    index = s.make_index(tmp_path / "index", {})
    with s.serving(index, public_url="https://Videos.example.org:443/svb/") as served, s.serving(index) as bare:
        for host, origin, status, bare_status in (
            ("videos.example.org", "https://videos.example.org", 200, 403),  # with the site's Host
            ("localhost:8765", "https://videos.example.org", 200, 403),  # with nginx's own
            ("localhost:8765", "http://localhost:8765", 200, 200),  # without the proxy
            ("videos.example.org", "https://evil.example", 403, 403),
            ("localhost:8765", "http://videos.example.org:81", 403, 403),
            ("evil.example", None, 403, 403),
        ):
            headers = {"host": host, **({"origin": origin} if origin else {})}
            for path in ("/api/search", "/svb/api/search"):
                answer = served.client.post(path, json={"text": "a"}, headers=headers)
                assert answer.status_code == status and "--public-url" not in answer.text, (host, origin)
            answer = bare.client.post("/api/search", json={"text": "a"}, headers=headers)
            assert answer.status_code == bare_status, (host, origin)
            assert bare_status == 200 or "behind a proxy, start it with --public-url" in answer.text


def test_a_session_is_for_the_address_that_its_page_has(tmp_path: Path) -> None:
    index = s.make_index(tmp_path / "index", {})
    for address, origin, path, is_secure in (
        ("https://a.example/b/c", "https://a.example", "/b/c/", True),
        ("https://a.example/b/c", None, "/b/c/", True),
        ("https://a.example/b/c", "http://localhost:8765", "/", False),
        ("http://a.example:80", "http://a.example", "/", False),
    ):
        with s.serving(index, token=TOKEN, public_url=address) as served:
            headers = {"host": "localhost:8765", **({"origin": origin} if origin else {})}
            cookie = served.client.post("/login", data={"token": TOKEN}, headers=headers).headers["set-cookie"]
        assert (f"Path={path};" in cookie, "Secure" in cookie) == (True, is_secure), (address, origin, cookie)


def test_an_address_that_is_none_is_refused(run_svb: RunSvb) -> None:
    wrong = ["videos.example.org", "ftp://a.example", "https://", "https://a.example/?q=1", "https://a.example/#a"]
    wrong += ["https://a@b.example", "https://a.example/a b", "https://a.example//b", "https://a.example/../b", ""]
    for url in wrong:
        ran = run_svb("serve", "--public-url", url)
        assert ran.exit_code == 2, url
        assert "expected an address such as https://videos.example.org/svb" in ran.stderr
