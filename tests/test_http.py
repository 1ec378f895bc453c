"""`fetch.http.download` against a real server on this machine that misbehaves in every way we know."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from clipmill.datasets import Remote
from clipmill.errors import FetchError
from clipmill.fetch.governor import seconds_to_wait
from clipmill.fetch.http import download
from clipmill.fetch.watch import Watch

BODY = bytes(range(251)) * 17_000  # 4.3 MB: several blocks, and no block equals another
SHA256 = "sha256:" + hashlib.sha256(BODY).hexdigest()
MD5 = "md5:" + hashlib.md5(BODY).hexdigest()


@dataclass
class Server:
    """Serves BODY under any path; `plan` says how the next requests of a path are answered, the last one for ever."""

    plan: dict[str, list[str]] = field(default_factory=dict)
    log: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    body: bytes = BODY
    etag: str | None = '"one"'
    released: threading.Event = field(default_factory=threading.Event)
    address: str = ""

    def url(self, path: str) -> str:
        return f"{self.address}/{path}"

    def how(self, path: str) -> str:
        steps = self.plan.get(path, ["fine"])
        return steps.pop(0) if len(steps) > 1 else steps[0]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server: Server = self.server.state  # type: ignore[attr-defined]
        path = self.path.lstrip("/")
        asked = self.headers.get("Range")
        server.log.append((path, asked, self.headers.get("If-Range")))
        how, _, detail = server.how(path).partition(":")
        self.close_connection = True
        if how == "status":
            code, _, after = detail.partition(",")
            self.send_response(int(code))
            if after:
                self.send_header("Retry-After", after)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if how == "page":
            self.answer(200, b"<!DOCTYPE html><html><body>Log in</body></html>", {"Content-Type": detail})
            return
        start = int(asked[6:-1]) if asked and how != "whole" else 0
        if start and self.headers.get("If-Range") not in (None, server.etag) and how != "heedless":
            start = 0
        body = b"X" * len(server.body) if how == "other" else server.body
        extra = {"ETag": server.etag} if server.etag else {}
        if how == "416" and start:
            self.answer(416, b"", {"Content-Range": f"bytes */{len(body)}"})
            return
        if start:
            extra["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        upto = start + int(detail) if detail else len(body)
        self.answer(206 if start else 200, body[start:upto], extra, promised=len(body) - start)
        if how == "stall":
            server.released.wait(20)
        if how == "reset":
            time.sleep(0.1)  # what was not read yet when a reset comes is lost
            # Closing with this set sends RST in the place of FIN.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def answer(self, code: int, body: bytes, headers: dict[str, str], promised: int | None = None) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if promised is None else promised))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()


@pytest.fixture
def server():
    state = Server()
    service = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service.daemon_threads = True
    service.state = state  # type: ignore[attr-defined]
    state.address = f"http://127.0.0.1:{service.server_port}"
    thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield state
    state.released.set()
    service.shutdown()
    service.server_close()


def remote(server: Server, *paths: str, **facts: object) -> Remote:
    return Remote(
        "a.zip",
        tuple(server.url(path) for path in paths or ("a.zip",)),
        **{"size": len(BODY), "checksum": SHA256, **facts},
    )  # type: ignore[arg-type]


def get(what: Remote, folder: Path, **options: object) -> Path:
    return download(what, folder / "a.zip", **{"pause_s": 0.01, "timeout_s": 5, "retries": 3, **options})  # type: ignore[arg-type]


def parts(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.endswith(".part"))


def test_a_file_comes_whole_and_leaves_nothing_beside_it(server, tmp_path):
    assert get(remote(server), tmp_path / "new/folder").read_bytes() == BODY
    assert [path.name for path in (tmp_path / "new/folder").iterdir()] == ["a.zip"]


@pytest.mark.parametrize("checksum", [SHA256, MD5, SHA256.upper().replace("SHA256", "sha256"), None])
def test_a_file_that_is_there_and_right_is_not_asked_for(server, tmp_path, checksum):
    (tmp_path / "a.zip").write_bytes(BODY)
    get(remote(server, checksum=checksum), tmp_path)
    assert server.log == []


def test_a_file_that_is_there_and_wrong_is_replaced(server, tmp_path):
    (tmp_path / "a.zip").write_bytes(b"half" + BODY[4:])
    assert get(remote(server), tmp_path).read_bytes() == BODY


@pytest.mark.parametrize(
    "trouble",
    [
        "status:500",
        "status:503,0",
        "status:429,1",
        "status:408",
        "reset:2000000",
        "short:3000000",
        "short:0",
        "416:1000000",
    ],
)
def test_what_passes_heals_without_a_word_to_the_caller(server, tmp_path, trouble):
    server.plan["a.zip"] = [trouble, trouble, "fine"]
    assert get(remote(server), tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("trouble", ["reset", "short"])
def test_it_goes_on_where_it_broke_off(server, tmp_path, trouble):
    server.plan["a.zip"] = [f"{trouble}:3000000", "fine"]
    assert get(remote(server), tmp_path, retries=1).read_bytes() == BODY
    asked = [int(range_[6:-1]) for _, range_, _ in server.log if range_]
    assert len(asked) == 1
    assert 0 < asked[0] <= 3_000_000
    assert server.log[1][2] == '"one"'


def test_as_long_as_it_gets_further_it_is_no_retry(server, tmp_path):
    server.plan["a.zip"] = ["short:1100000"] * 3 + ["fine"]
    assert get(remote(server), tmp_path, retries=0).read_bytes() == BODY


def test_a_server_that_breaks_off_at_the_same_place_for_ever_is_given_up(server, tmp_path):
    server.plan["a.zip"] = ["whole:2000000"]
    with pytest.raises(FetchError, match="broke off"):
        get(remote(server), tmp_path, retries=1)
    assert len(server.log) <= 4


def test_a_stall_ends_with_the_time_limit_and_what_came_is_kept(server, tmp_path):
    server.plan["a.zip"] = ["stall:2000000", "stall:10"]
    with pytest.raises(FetchError, match=r"said nothing for 0\.3 s"):
        get(remote(server), tmp_path, timeout_s=0.3, retries=0)
    assert parts(tmp_path)
    server.plan.clear()
    get(remote(server), tmp_path)
    assert re.fullmatch(r"bytes=\d+-", server.log[-1][1])


def test_a_server_that_knows_no_ranges_sends_it_all_again(server, tmp_path):
    server.plan["a.zip"] = ["short:2000000", "whole"]
    assert get(remote(server), tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("heed", ["fine", "heedless"])
@pytest.mark.parametrize("known", [SHA256, None])
def test_a_file_that_changed_meanwhile_is_never_glued_to_the_old_half(server, tmp_path, known, heed):
    server.body, server.etag = b"o" * len(BODY), '"old"'
    server.plan["a.zip"] = ["short:2000000", "status:404"]
    with pytest.raises(FetchError):
        get(remote(server, checksum=known), tmp_path, retries=0)
    server.body, server.etag = BODY, '"new"'
    server.plan["a.zip"] = [heed]
    server.log.clear()
    assert get(remote(server, checksum=known), tmp_path).read_bytes() == BODY
    assert server.log[0][2] == '"old"'


def test_where_nothing_tells_whether_the_file_changed_it_begins_anew(server, tmp_path):
    server.etag = None
    server.plan["a.zip"] = ["short:2000000", "fine"]
    get(remote(server, checksum=None), tmp_path)
    assert [range_ for _, range_, _ in server.log] == [None, None]


def test_with_a_checksum_it_goes_on_without_a_validator_and_begins_anew_where_that_was_wrong(
    server, tmp_path
):
    server.etag = None
    server.body = b"o" * len(BODY)
    server.plan["a.zip"] = ["short:2000000", "status:404"]
    with pytest.raises(FetchError):
        get(remote(server), tmp_path, retries=0)
    server.body, server.plan = BODY, {}
    server.log.clear()
    assert get(remote(server), tmp_path, retries=0).read_bytes() == BODY
    assert [bool(range_) for _, range_, _ in server.log] == [True, False]


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("status:404", "HTTP 404 Not Found"),
        ("status:403", "HTTP 403 Forbidden"),
        ("status:410", "HTTP 410 Gone"),
        ("page:text/html", "sent a web page in place of a.zip"),
        ("page:application/zip", r"offers a file of 47 bytes, expected \d+"),
        ("other", "has checksum sha256:.*, expected sha256:"),
    ],
)
def test_what_will_not_change_is_asked_once_and_then_the_mirror(server, tmp_path, trouble, said):
    server.plan["bad"] = [trouble]
    assert get(remote(server, "bad", "good"), tmp_path / "1").read_bytes() == BODY
    assert [path for path, _, _ in server.log] == ["bad", "good"]
    with pytest.raises(FetchError, match=said) as caught:
        get(remote(server, "bad"), tmp_path / "2", mend="Give --archive FILE or --mirror URL")
    assert server.url("bad") in str(caught.value)
    assert str(caught.value).endswith("Give --archive FILE or --mirror URL")
    assert len(server.log) == 3
    assert not (tmp_path / "2/a.zip").exists()


def test_a_page_without_a_type_is_known_by_its_first_bytes(server, tmp_path):
    server.plan["a.zip"] = ["page:application/octet-stream"]
    with pytest.raises(FetchError, match="sent a web page"):
        get(remote(server, size=None, checksum=None), tmp_path)
    assert not (tmp_path / "a.zip").exists()


def test_a_file_of_the_wrong_checksum_is_thrown_away(server, tmp_path):
    server.plan["a.zip"] = ["other"]
    with pytest.raises(FetchError, match=re.escape(SHA256)):
        get(remote(server), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_mirror_does_not_cost_what_came_from_the_official_address(server, tmp_path):
    server.plan["official"], server.plan["mirror"] = ["short:3000000", "status:500", "fine"], ["status:500"]
    get(remote(server, "official", "mirror"), tmp_path)
    assert server.log[-1][0] == "official"
    assert server.log[-1][1] is not None


def test_retry_after_is_waited_for_whether_in_seconds_or_as_a_date(server, tmp_path):
    said = []
    server.plan["a.zip"] = ["status:429,1", "fine"]
    get(remote(server), tmp_path, watch=Watch(say=said.append))
    assert said == ["a.zip: HTTP 429 Too Many Requests and asks to wait for 1 s; asking again in 1 s"]
    assert seconds_to_wait("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert (
        3000
        < seconds_to_wait(time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 3600)))
        < 3700
    )
    assert seconds_to_wait("soon") is None


def test_a_server_that_wants_an_hour_is_not_waited_for(server, tmp_path):
    server.plan["a.zip"] = ["status:503,3600"]
    with pytest.raises(FetchError, match="asks to wait for 3600 s"):
        get(remote(server), tmp_path)
    assert len(server.log) == 1


def test_an_address_where_nobody_listens_and_one_that_is_none_are_said_so(tmp_path):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{held.getsockname()[1]}/a.zip"
        what = Remote("a.zip", (nobody, "htp:/nowhere"), 1, None)
        with pytest.raises(FetchError, match="Connection refused") as caught:
            get(what, tmp_path, retries=1)
    assert "htp:/nowhere: is no address" in str(caught.value)


def test_a_disk_that_cannot_be_written_is_an_error_of_ours_and_not_of_the_server(server, tmp_path):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        get(remote(server), tmp_path, watch=Watch(update=full))
    assert parts(tmp_path)
    assert len(server.log) == 1
    get(remote(server), tmp_path)
    assert server.log[-1][1] is not None


def test_killed_in_the_middle_it_goes_on_by_range(server, tmp_path):
    server.plan["a.zip"] = ["stall:3000000", "fine"]
    code = (
        "import sys; from pathlib import Path; from clipmill.datasets import Remote; from clipmill.fetch.http import download\n"
        f"download(Remote('a.zip', ({server.url('a.zip')!r},), {len(BODY)}, {SHA256!r}), Path(sys.argv[1]) / 'a.zip')"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not any(part.stat().st_size >= 2 << 20 for part in parts(tmp_path)):
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "a.zip").exists()
    come = parts(tmp_path)[0].stat().st_size
    assert get(remote(server), tmp_path).read_bytes() == BODY
    assert server.log[-1] == ("a.zip", f"bytes={come}-", '"one"')
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]
