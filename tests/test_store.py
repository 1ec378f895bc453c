"""`stores`: the bytes of shards near and far, read through real servers that also fail; and what is kept of them."""

from __future__ import annotations

import importlib.util
import io
import os
import pickle
import resource
import socket
import subprocess
import sys
import tarfile
import threading
import time
import uuid
import warnings
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import fsspec
import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipmill.errors import ConfigError, ShardError
from clipmill.stores.store import ReadFailure, cache_folder, open_store
from clipmill.types import REASONS
from conftest import Bucket
from misbehaving import Body, Fine, Misbehaving, Reset, Short, Stall, Status

BODY = np.random.default_rng(0).bytes(3_000_000)
CLIPS = [("a.tar", start, 40_000) for start in range(512, 2_900_000, 90_112)]
"""Thirty-three stretches that begin where a tar's members may."""


def right(found: list[bytes | ReadFailure], wanted: list[tuple[str, int, int]], body: bytes = BODY) -> bool:
    return found == [body[offset : offset + length] for _, offset, length in wanted]


def reasons(found: list[bytes | ReadFailure]) -> list[str]:
    for one in found:
        assert isinstance(one, ReadFailure), one
    return [one.reason for one in found]  # type: ignore[union-attr]


def run_python(code: str, *arguments: object) -> str:
    """What a process of its own prints; it must end by itself, and well."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPMILL_CACHE", str(tmp_path / "copies"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shards/sub").mkdir(parents=True)
    (tmp_path / "shards/a.tar").write_bytes(BODY)
    (tmp_path / "shards/b.tar").write_bytes(b"short")
    return tmp_path / "shards"


@pytest.fixture
def web():
    with Misbehaving(BODY) as server:
        yield server


def ranges(server: Misbehaving, name: str = "a.tar") -> int:
    """How many stretches were asked for, not counting those of a single byte that ask what the file is."""
    return sum(request.range != "bytes=0-0" for request in server.asked(name))


@pytest.fixture
def filled(bucket: Bucket) -> Bucket:
    """A bucket with the shards under `set/`."""
    for key, body in {"a.tar": BODY, "b.tar": b"short", "sub/c.tar": b"", "": b""}.items():
        bucket.put(key, body)
    return bucket


@pytest.fixture
def memory():
    """The shards in fsspec's own memory: a file system without coroutines."""
    place = f"memory://{uuid.uuid4().hex}"
    fsspec.filesystem("memory").pipe(
        {f"{place}/a.tar": BODY, f"{place}/b.tar": b"short", f"{place}/sub/c.tar": b""}
    )
    return place


@pytest.fixture(params=["folder", "file", "s3", "memory"])
def place(request) -> str:
    """The same shards, near and far."""
    if request.param == "s3":
        return request.getfixturevalue("filled").url
    if request.param == "memory":
        return request.getfixturevalue("memory")
    return ("file://" if request.param == "file" else "") + str(request.getfixturevalue("folder"))


class Silent:
    """A server that accepts, and then says nothing."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.accepted: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        try:
            while True:
                self.accepted.append(self.socket.accept()[0])
        except OSError:
            return


@pytest.fixture
def silent():
    server = Silent()
    yield server
    server.socket.shutdown(socket.SHUT_RDWR)
    for one in (server.socket, *server.accepted):
        one.close()


# Every store


def test_a_store_names_its_files_and_says_what_each_is(place):
    store = open_store(place + "/")
    assert store.place == place.removeprefix("file://")
    assert store.near == (not place.startswith(("s3:", "memory:")))
    assert store.path("a.tar") == f"{store.place}/a.tar"
    assert store.names() == ["a.tar", "b.tar"]
    assert (store.size("a.tar"), store.size("b.tar")) == (len(BODY), 5)
    assert [store.exists(name) for name in ("a.tar", "no.tar")] == [True, False]
    first, second = store.versions(["a.tar", "b.tar"])
    assert first != second
    assert store.versions(["b.tar", "a.tar"]) == [second, first]
    for ask in (store.size, store.local, lambda name: store.versions([name])):
        with pytest.raises(ShardError, match=r"no\.tar: is not there"):
            ask("no.tar")


def test_a_store_gives_stretches_in_the_order_asked_and_a_reason_for_each_that_it_has_not(place):
    store = open_store(place)
    assert right(store.fetch(CLIPS), CLIPS)
    bad = [("no.tar", 0, 10), ("a.tar", len(BODY) - 6, 10), ("a.tar", len(BODY) + 512, 10)]
    found = store.fetch([bad[0], CLIPS[0], bad[1], CLIPS[1], bad[2]])
    assert right([found[1], found[3]], CLIPS[:2])
    assert reasons([found[0], found[2], found[4]]) == ["missing", "corrupt", "corrupt"]
    assert f"a.tar: 6 of 10 bytes are there from byte {len(BODY) - 6} on" in str(found[2])
    assert "a.tar: 0 of 10 bytes" in str(found[4])
    assert store.fetch([]) == []
    store.close()
    assert right(store.fetch(CLIPS), CLIPS)


def test_a_store_opens_files_whole_and_has_them_on_this_machine(place):
    store = open_store(place)
    with store.open("a.tar") as file:
        assert file.seek(-100, os.SEEK_END) == len(BODY) - 100
        assert file.read(200) == BODY[-100:]
        assert file.read(1) == b""
        file.seek(262_140)
        assert file.read(524_300) == BODY[262_140:786_440]
        file.seek(0)
        assert file.read() == BODY
    with pytest.raises(ReadFailure, match="is not there") as caught:
        store.open("no.tar")
    assert caught.value.reason == "missing"
    assert store.local("a.tar").read_bytes() == BODY
    assert store.local("a.tar") == store.local("a.tar")


def test_a_store_travels_to_other_processes_light_and_without_what_is_open(place):
    store = open_store(place, cache=Path("/nowhere"), settings={"timeout_s": 7})
    store.fetch(CLIPS[:1])
    sent = pickle.dumps(store)
    assert len(sent) < 300
    assert right(pickle.loads(sent).fetch(CLIPS), CLIPS)


def test_many_threads_read_from_one_store(place):
    store, wrong = open_store(place), []

    def read() -> None:
        wrong.extend(part for part in pairwise(CLIPS[:9]) if not right(store.fetch(list(part)), list(part)))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_failure_keeps_its_reason_when_it_travels():
    failure = pickle.loads(pickle.dumps(ReadFailure("missing", "a.tar: is not there")))
    assert (failure.reason, str(failure)) == ("missing", "a.tar: is not there")
    assert failure.reason in REASONS


def test_a_protocol_that_cannot_be_says_what_can():
    with pytest.raises(ConfigError, match=r"fsspec knows no protocol nope://; allowed are a folder, s3"):
        open_store("nope://there")


def test_a_store_that_is_left_open_neither_holds_up_the_end_of_a_process_nor_is_heard_in_it(web, silent):
    code = """
import os, signal, sys, threading
from clipmill.stores.store import open_store
assert isinstance(open_store(sys.argv[1]).fetch([("a.tar", 0, 10)])[0], bytes)
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    open_store(sys.argv[2]).fetch([("a.tar", 0, 10)] * 8)
except KeyboardInterrupt:
    print("interrupted")
"""
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, f"{web.root}/watch", silent.url],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("interrupted\n", "")
    assert time.monotonic() - begun < 14  # one try takes 15 s


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_a_protocol_without_its_package_says_how_to_install_it():
    with pytest.raises(ConfigError, match="`pip install gcsfs`"):
        open_store("gs://bucket/set")


def test_copies_are_kept_where_the_environment_says(monkeypatch):
    assert str(cache_folder()).endswith("/copies")
    monkeypatch.delenv("CLIPMILL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/clipmill")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/clipmill"


# Near


def test_near_bytes_go_straight_into_the_buffers(folder):
    store = open_store(str(folder))
    one, two = bytearray(100), bytearray(1000)
    assert store.read_into("a.tar", 512, [memoryview(one), memoryview(two)]) == 1100
    assert one + two == BODY[512:1612]
    assert store.read_into("b.tar", 3, [memoryview(one)]) == 2
    for name, reason in {"no.tar": "missing", "sub": "unreadable"}.items():
        with pytest.raises(ReadFailure) as caught:
            store.read_into(name, 0, [memoryview(one)])
        assert caught.value.reason == reason
    assert reasons(store.fetch([("sub", 0, 1)])) == ["unreadable"]


def test_a_folder_that_is_not_there_is_said_so(tmp_path):
    with pytest.raises(ShardError, match="is no folder that can be read"):
        open_store(str(tmp_path / "no")).names()


def test_a_near_store_asks_for_nothing_to_be_copied(folder):
    assert open_store(str(folder)).local("a.tar") == folder / "a.tar"


def test_more_shards_than_descriptors_are_read_by_many_threads_from_several_folders(tmp_path):
    for part in "abc":
        (tmp_path / part).mkdir()
        for number in range(60):
            (tmp_path / part / f"{number}.tar").write_bytes(f"{part}{number:04d}".encode())
    code = """
import os, resource, sys, threading
from clipmill.stores.store import open_store
resource.setrlimit(resource.RLIMIT_NOFILE, (90, 90))
stores = {part: open_store(f"{sys.argv[1]}/{part}") for part in "abc"}
wanted = [(f"{number * 7 % 60}.tar", 0, 5) for number in range(600)]
wrong = []
def read(part):
    for name, offset, length in wanted:
        if stores[part].fetch([(name, offset, length)]) != [f"{part}{int(name[:-4]):04d}".encode()]:
            wrong.append((part, name))
threads = [threading.Thread(target=read, args=(part,)) for part in "aabbcc"]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
[store.close() for store in stores.values()]
print(len(wrong), len(os.listdir("/proc/self/fd")) < 10)
"""
    assert run_python(code, tmp_path) == "0 True\n"


# Far: what servers do


def web_store(server: Misbehaving, **given: object):
    return open_store(f"{server.root}/watch", **given)  # type: ignore[arg-type]


def test_a_web_server_is_read_by_ranges(web):
    store = web_store(web)
    assert right(store.fetch(CLIPS), CLIPS)
    assert store.size("a b#?.tar") == len(BODY)
    assert web.asked("a b#?.tar")
    with store.open("a.tar") as file:
        file.seek(1_000_000)
        assert file.read(10) == BODY[1_000_000:1_000_010]
    assert store.local("a.tar").read_bytes() == BODY


@pytest.mark.parametrize("trouble", [Status(503), Status(429), Reset(0), Short(10_000)])
def test_what_passes_is_asked_again_and_heals(web, trouble):
    web.behave("a.tar", trouble, times=2)
    assert right(web_store(web).fetch(CLIPS[:1]), CLIPS[:1])
    assert len(web.asked("a.tar")) == 3


@pytest.mark.parametrize(
    ("trouble", "reason", "asked"),
    [
        (Status(404), "missing", 1),
        (Status(403), "forbidden", 1),
        (Status(400), "unreadable", 1),
        (Status(500), "network", 3),
        (Reset(9), "network", 3),
        (Stall(100), "timeout", 2),
        (Body(b"too little"), "corrupt", 1),
        (Fine(ranges=False), "unreadable", 1),
    ],
)
def test_what_does_not_pass_is_given_up_with_its_reason(web, trouble, reason, asked):
    web.behave("a.tar", trouble)
    store = web_store(web, settings={"timeout_s": 2.0})
    bad, good = store.fetch([CLIPS[3], ("b.tar", *CLIPS[3][1:])])
    assert reasons([bad]) == [reason]
    assert str(bad).startswith(f"{web.root}/watch/a.tar: ")
    assert right([good], CLIPS[3:4])
    assert len(web.asked("a.tar")) == asked


@pytest.mark.parametrize("trouble", [Status(403), Status(500), Stall(0), Reset(0)])
def test_an_open_file_fails_with_the_reason_while_it_is_read(web, trouble):
    file = web_store(web, settings={"timeout_s": 0.6}).open("a.tar")
    assert file.read(10) == BODY[:10]
    web.behave("a.tar", trouble)
    file.seek(2_000_000)
    with pytest.raises(ReadFailure, match=r"a\.tar: "):
        file.read(10)
    web.behave("a.tar", Fine())
    assert file.read(10) == BODY[2_000_000:2_000_010]


def test_s3_is_asked_as_often_as_any_other_server_and_no_layer_below_asks_again(
    web, credentials, monkeypatch
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", web.root)
    store = open_store("s3://bucket/set")
    for trouble, reason, asked in (
        (503, "network", 3),
        (500, "network", 3),
        (403, "forbidden", 1),
        (404, "missing", 1),
        (None, "network", 3),
    ):
        name = f"{trouble}.tar"
        web.behave(f"/bucket/set/{name}", Status(trouble) if trouble else Reset(9))
        assert reasons(store.fetch([(name, 0, 10)])) == [reason]
        assert len(web.asked(f"/bucket/set/{name}")) == asked
    web.behave("/bucket/set/a.tar", Status(503), times=2)
    assert right(store.fetch(CLIPS[:1]), CLIPS[:1])
    web.behave("/bucket/set/a.tar", Reset(9), times=2)
    assert right(store.fetch(CLIPS[:1]), CLIPS[:1])
    web.behave("/bucket/set/a.tar", Fine(ranges=False))
    assert reasons(store.fetch(CLIPS[:1])) == ["unreadable"]


@pytest.mark.parametrize("protocol", ["http", "s3"])
def test_a_server_that_accepts_and_says_nothing_costs_the_time_limit_once_for_a_whole_batch(
    silent, protocol, credentials, monkeypatch
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", silent.url)
    store = open_store(silent.url if protocol == "http" else "s3://bucket/set", settings={"timeout_s": 1.0})
    begun = time.monotonic()
    assert set(reasons(store.fetch([("a.tar", 512 * at, 512) for at in range(32)]))) == {"timeout"}
    assert 0.9 < time.monotonic() - begun < 8
    assert len(silent.accepted) >= 32  # none waited for another


def test_whether_a_file_is_there_is_not_guessed_where_the_server_does_not_say(web, silent):
    web.behave("no.tar", Status(403))
    web.behave("bad.tar", Status(500))
    for where, name, said in (
        (f"{web.root}/watch", "no.tar", "refuses it"),
        (f"{web.root}/watch", "bad.tar", "HTTP 500"),
        (silent.url, "a.tar", "took longer than the time limit"),
    ):
        with pytest.raises(ShardError, match=said):
            open_store(where, settings={"timeout_s": 0.4}).exists(name)


def test_where_nobody_listens_it_is_the_network(credentials, monkeypatch):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{held.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", nobody)
        for where in (nobody, "s3://bucket/set"):
            assert reasons(open_store(where).fetch([("a.tar", 0, 10)])) == ["network"]


def test_s3_without_credentials_says_that_they_are_missing(filled, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    failure = open_store(filled.url).fetch([("a.tar", 0, 10)])
    assert reasons(failure) == ["forbidden"]
    assert "credentials come from the environment" in str(failure[0])
    given = open_store(filled.url, settings={"key": "a", "secret": "b", "config_kwargs": {"read_timeout": 3}})
    assert right(given.fetch(CLIPS), CLIPS)


def test_a_bucket_or_a_prefix_that_is_not_there_is_said_so(filled):
    for where in ("s3://no-such-bucket/set", f"{filled.url}/no"):
        with pytest.raises(ShardError, match="is not there"):
            open_store(where).names()


@pytest.fixture
def plain(folder):
    """The server that everyone has: it lists folders, and knows no ranges."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    service = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder.parent)))
    threading.Thread(target=service.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{service.server_port}/shards"
    service.shutdown()
    service.server_close()


def test_a_server_without_ranges_gives_small_files_whole_and_refuses_to_be_read_by_parts(plain, folder):
    (folder / "a b.json").write_text("{}")
    store = open_store(plain)
    assert store.names() == ["a b.json", "a.tar", "b.tar"]
    assert store.local("a b.json").read_text() == "{}"
    assert (store.size("a.tar"), store.exists("no.tar")) == (len(BODY), False)
    [failure] = store.fetch(CLIPS[:1])
    assert reasons([failure]) == ["unreadable"]
    assert "sends the whole file where a part was asked for; copy the shards" in str(failure)
    (folder / "empty.tar").write_bytes(b"")
    assert store.local("empty.tar").read_bytes() == b""


def test_where_a_server_lists_nothing_the_error_says_how_to_name_the_shards(web, plain):
    for where in (f"{web.root}/watch", plain + "/no"):
        with pytest.raises(ShardError, match=r"name the shards, as in .*/name-\{000000\.\.000012\}\.tar"):
            open_store(where).names()


def test_tar_headers_and_hdf5_are_read_from_afar(filled):
    where, put = filled.url, filled.put
    packed, hdf5 = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for number in range(50):
            member = tarfile.TarInfo(f"{number}.flac")
            member.size = 20_000
            tar.addfile(member, io.BytesIO(BODY[: member.size]))
    with h5py.File(hdf5, "w") as file:
        file["waveform"] = np.arange(400_000, dtype=np.int16).reshape(4, -1)
    put("t.tar", packed.getvalue())
    put("h.h5", hdf5.getvalue())
    store = open_store(where)
    with store.open("t.tar") as raw, tarfile.open(fileobj=raw) as tar:
        assert [member.offset_data for member in tar] == [512 + number * 20_992 for number in range(50)]
    with store.open("h.h5") as raw, h5py.File(raw, "r") as file:
        assert (file["waveform"][3] == np.arange(300_000, 400_000).astype(np.int16)).all()


def test_a_fork_neither_shares_nor_harms_its_parents_connections(web):
    code = """
import gc, os, sys, time
from pathlib import Path
from clipmill.stores.store import open_store

def right(at):
    return all(isinstance(data, bytes) for data in store.fetch([("a.tar", at + 512 * clip, 400) for clip in range(32)]))

def sockets():
    links = (os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))
    return sum("socket:" in link for link in links)

store = open_store(sys.argv[1], cache=Path(sys.argv[2]))
before = sockets()
assert right(0)
assert sockets() > before + 2
for again in (1, 2):
    child = os.fork()
    if child == 0:
        good = right(20_000 * again)
        del store
        gc.collect()
        os._exit(not good)
    assert right(200_000 * again)
    assert os.waitpid(child, 0)[1] == 0
    begun = time.monotonic()
    assert right(100_000 * again)
    assert time.monotonic() - begun < 10  # a connection whose answer nobody hears costs 15 s
store.close()
assert sockets() <= before + 2  # fsspec's loop has a pair of its own
"""
    run_python(code, f"{web.root}/watch", cache_folder())


# Copies


def test_a_copy_is_made_once_and_anew_when_the_file_changes(filled, tmp_path):
    where, put = filled.url, filled.put
    store = open_store(where)
    first = store.local("a.tar")
    assert first.name == "a.tar"
    before = first.stat().st_ino
    assert open_store(where).local("a.tar").stat().st_ino == before
    put("a.tar", BODY[::-1])
    assert store.local("a.tar").read_bytes() == BODY[::-1]
    assert list((tmp_path / "copies").rglob("*a.tar*")) == [store.local("a.tar")]
    other = open_store(where, cache=tmp_path / "other").local("a.tar")
    assert other.is_relative_to(tmp_path / "other")


def test_many_who_copy_at_once_get_one_whole_file(web):
    stores = [web_store(web) for _ in range(4)]
    got: list[bytes] = []
    threads = [threading.Thread(target=lambda s=s: got.append(s.local("a.tar").read_bytes())) for s in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [BODY] * 4
    assert len(list(cache_folder().rglob("*.*"))) == 1


def test_a_copy_that_does_not_come_whole_leaves_nothing(web):
    web.behave_from("a.tar", Status(403), 2)
    with pytest.raises(ShardError, match="refuses it"):
        web_store(web).local("a.tar")
    assert not list(cache_folder().rglob("*.*"))


def test_a_file_replaced_while_it_is_copied_is_not_taken_for_either(web):
    web.behave_from("a.tar", Body(BODY + b"more"), 3)
    with pytest.raises(ShardError, match="was replaced while it was read"):
        web_store(web).local("a.tar")


def test_a_place_for_copies_that_cannot_be_names_what_mends_it(web, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CLIPMILL_CACHE", str(tmp_path / "file"))
    with pytest.raises(ShardError, match="CLIPMILL_CACHE names another folder"):
        web_store(web).local("a.tar")


# The cache


def shard_cache(tmp_path: Path) -> tuple[Path, Path]:
    """The one shard's bytes and sums in the cache."""
    [folder] = (tmp_path / "cache").glob("clips/*/a.tar.clips")
    bytes_, sums = sorted(folder.iterdir())
    return bytes_, sums


def test_what_the_cache_has_is_not_asked_for_again(web, tmp_path):
    assert right(web_store(web, cache=tmp_path / "cache").fetch(CLIPS), CLIPS)
    assert ranges(web) == len(CLIPS)
    store = web_store(web, cache=tmp_path / "cache")
    assert right(store.fetch(CLIPS[::-1]), CLIPS[::-1])
    assert right(store.fetch(CLIPS), CLIPS)
    assert ranges(web) == len(CLIPS)
    assert len(web.asked("a.tar")) == len(CLIPS) + 2  # and once in each store what the file is
    held = sum(path.stat().st_blocks * 512 for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert held < 1.6 * sum(length for _, _, length in CLIPS)  # sparse: pages that clips touch


def test_without_a_cache_no_clip_is_kept(web):
    store = web_store(web)
    assert right(store.fetch(CLIPS), CLIPS)
    assert right(store.fetch(CLIPS), CLIPS)
    assert ranges(web) == 2 * len(CLIPS)
    assert not cache_folder().exists()


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize(
    "what", ["a flipped byte", "bytes lost", "end lost", "a flipped sum", "sums lost", "sums cut"]
)
def test_damage_in_the_cache_is_noticed_and_mended(web, tmp_path, what):
    clip = CLIPS[-1]
    web_store(web, cache=tmp_path / "cache").fetch([clip])
    data, sums = shard_cache(tmp_path)
    size = data.stat().st_size
    if what == "a flipped byte":
        flip(data, clip[1] + 20_000)
    elif what == "bytes lost":  # as a power cut leaves them
        data.write_bytes(bytes(size))
    elif what == "end lost":
        os.truncate(data, size - 1)
    elif what == "a flipped sum":
        flip(sums, clip[1] // 32 + 17)
    elif what == "sums lost":
        sums.write_bytes(bytes(sums.stat().st_size))
    else:
        os.truncate(sums, sums.stat().st_size - 1)
    for asked in (2, 2):
        assert right(web_store(web, cache=tmp_path / "cache").fetch([clip]), [clip])
        assert ranges(web) == asked


def test_a_shard_replaced_on_the_server_is_not_served_from_the_old_cache(filled, tmp_path):
    where, put = filled.url, filled.put
    old = open_store(where, cache=tmp_path / "cache")
    assert right(old.fetch(CLIPS), CLIPS)
    put("a.tar", BODY[::-1])
    new = open_store(where, cache=tmp_path / "cache")
    assert right(new.fetch(CLIPS), CLIPS, BODY[::-1])
    assert right(new.fetch(CLIPS), CLIPS, BODY[::-1])
    shard_cache(tmp_path)  # the old one's files are gone


def test_a_failure_is_not_cached(web, tmp_path):
    store = web_store(web, cache=tmp_path / "cache")
    web.behave("a.tar", Status(404), times=1)
    assert reasons(store.fetch(CLIPS[:2])) == ["missing", "missing"]
    assert right(store.fetch(CLIPS[:2]), CLIPS[:2])
    web.behave("a.tar", Status(403), times=1)
    assert reasons(store.fetch(CLIPS[2:3])) == ["forbidden"]
    assert right(store.fetch(CLIPS[2:3]), CLIPS[2:3])


def test_no_name_leads_out_of_the_cache(web, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/kept").write_text("mine")
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    store = web_store(web, cache=tmp_path / "cache/deep")
    for name in ("..", "../../../../mine", "/../../../../mine", str(tmp_path / "mine")):
        store.fetch([(name, 0, 100)])
        with suppress(ShardError):
            store.local(name)
    made = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert made
    assert all(path.is_relative_to(tmp_path / "cache/deep") for path in made)
    assert (tmp_path / "mine/kept").read_text() == "mine"


def test_a_full_cache_is_filled_no_further_says_so_once_and_fails_no_read(web, tmp_path):
    store = web_store(web, cache=tmp_path / "cache", settings={"cache_bytes": 500_000})
    with pytest.warns(RuntimeWarning, match=r"filled no further \(its limit of 500000 bytes is reached\)"):
        assert right(store.fetch(CLIPS), CLIPS)
    held = sum(path.stat().st_blocks * 512 for path in (tmp_path / "cache").rglob("*"))
    assert 250_000 < held < 600_000
    asked = ranges(web)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert right(store.fetch(CLIPS), CLIPS)
    assert asked < ranges(web) < asked + len(CLIPS)


def test_a_disk_that_takes_no_more_fails_no_read(web, tmp_path):
    store = web_store(web, cache=tmp_path / "cache")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (CLIPS[9][1] + 100, hard))  # in the middle of a clip
    try:
        with pytest.warns(RuntimeWarning, match="filled no further"):
            assert right(store.fetch(CLIPS), CLIPS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert right(store.fetch(CLIPS), CLIPS)
    assert ranges(web) == 2 * len(CLIPS) - 9


def test_a_cache_that_cannot_be_written_fails_no_read(web, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="filled no further"):
        assert right(web_store(web, cache=tmp_path / "file").fetch(CLIPS), CLIPS)


def test_two_processes_fill_one_cache_at_once(web, tmp_path):
    code = """
import sys
from pathlib import Path
from clipmill.stores.store import open_store
store = open_store(sys.argv[1], cache=Path(sys.argv[2]))
wanted = [("a.tar", start, 40_000) for start in range(512, 2_900_000, 90_112)][::int(sys.argv[3])]
for at in range(0, len(wanted), 3):
    assert all(isinstance(data, bytes) for data in store.fetch(wanted[at : at + 3]))
"""
    command = [sys.executable, "-c", code, f"{web.root}/watch", str(tmp_path / "cache")]
    both = [subprocess.Popen([*command, step]) for step in ("1", "-1")]
    assert [one.wait(60) for one in both] == [0, 0]
    asked = ranges(web)
    assert asked <= 2 * len(CLIPS)
    assert right(web_store(web, cache=tmp_path / "cache").fetch(CLIPS), CLIPS)
    assert ranges(web) == asked


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 3000)), max_size=20))
def test_whatever_stretches_are_asked_for_the_cache_gives_what_the_file_holds(memory, tmp_path, parts):
    store = open_store(memory, cache=tmp_path / "cache")
    wanted = [("a.tar", offset, length) for offset, length in parts]
    assert right(store.fetch(wanted), wanted)
    assert right(store.fetch(wanted), wanted)
