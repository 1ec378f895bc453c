"""One segment by the real yt-dlp, from a local server that behaves and from one that does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from clipmill.audio import content_sha256, decode
from clipmill.audio.ffmpeg import ffmpeg_program
from clipmill.audio.media import encode_media
from clipmill.errors import ConfigError
from clipmill.fetch.segment import Ask, _cut_out, _downloader, fetch_segment
from misbehaving import Body, Fine, Misbehaving, Reset, Short, Stall, Status, chirps, webm

RATE = 48_000
CODECS = {
    "webm": ("webm", "libopus"),
    "opus": ("OGG", "OPUS"),
    "m4a": ("ipod", "aac"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "ogg": ("OGG", "VORBIS"),
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
}


@pytest.fixture
def server() -> Iterator[Misbehaving]:
    with Misbehaving() as running:
        yield running


@pytest.fixture
def ask(server: Misbehaving, tmp_path: Path) -> Callable[..., Ask]:
    def make(name: str = "k.webm", start_s: float = 1.0, end_s: float = 11.0, **more: object) -> Ask:
        plain = Ask(
            key="k", url=server.url(name), start_s=start_s, end_s=end_s, media_root=tmp_path / "media",
            stem="ab/-k_1000", parts=tmp_path / "parts" / "-k_1000", socket_timeout_s=1.0,
        )  # fmt: skip
        return replace(plain, **more)

    return make


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@cache
def minute(extension: str) -> bytes:
    return encode_media(chirps(60, RATE, 2), RATE, *CODECS[extension])


@cache
def minute_decoded(extension: str, folder: Path) -> np.ndarray:
    (folder / f"minute.{extension}").write_bytes(minute(extension))
    return decode(folder / f"minute.{extension}").samples


def ffmpeg(*arguments: object) -> None:
    subprocess.run([ffmpeg_program(), "-y", "-loglevel", "error", *map(str, arguments)], check=True)


def lag_ms(got: np.ndarray, want: np.ndarray) -> float:
    """By how much `got` comes after `want`, from their cross-correlation."""
    size = 2 * max(len(got), len(want))
    correlation = np.fft.irfft(np.conj(np.fft.rfft(want, size)) * np.fft.rfft(got, size), size)
    best = int(np.argmax(correlation))
    return (best - size if best > size // 2 else best) / RATE * 1e3


# --- what arrives


@pytest.mark.parametrize("extension", CODECS)
@pytest.mark.parametrize(
    ("start_s", "ranges"), [(0.0, True), (30.0, True), (30.0, False), (49.983, True)], ids=str
)
def test_a_segment_is_the_one_asked_for_to_the_millisecond(
    extension: str,
    ranges: bool,
    start_s: float,
    server: Misbehaving,
    ask: Callable[..., Ask],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    server.media = minute(extension)
    server.behave(None, Fine(ranges))
    name = f"k.{extension}"
    got = fetch_segment(ask(name, start_s, start_s + 10.0))
    assert (got.reason, got.message) == ("", "")
    want = minute_decoded(extension, tmp_path_factory.getbasetemp())[round(start_s * RATE) :][: 10 * RATE]
    heard = decode(tmp_path / "media" / got.source, got.start_s, got.end_s)
    assert heard.rate == RATE
    assert abs(lag_ms(heard.samples, want)) <= 1.0
    assert len(heard.samples) == pytest.approx(10 * RATE, abs=0.005 * RATE)
    assert got.duration_s == pytest.approx(10.0, abs=0.005)
    assert got.bytes == (tmp_path / "media" / got.source).stat().st_size


@cache
def minute_by_ffmpeg(encoding: str, folder: Path) -> bytes:
    (folder / "sound.wav").write_bytes(minute("wav"))
    codec, _, extension = encoding.partition(".")
    fragments = ["-movflags", "dash+delay_moov", "-frag_duration", 5_000_000] if extension == "m4a" else []
    ffmpeg("-i", folder / "sound.wav", "-c:a", codec, *fragments, folder / f"sound.{extension}")
    return (folder / f"sound.{extension}").read_bytes()


@pytest.mark.parametrize("start_s", [0.0, 0.1, 30.0])
@pytest.mark.parametrize("encoding", ["libopus.webm", "libopus.mka", "aac.m4a", "aac.mka", "libmp3lame.mp3"])
def test_so_it_is_from_files_that_state_how_much_an_encoder_put_before_the_sound(
    encoding: str,
    start_s: float,
    server: Misbehaving,
    ask: Callable[..., Ask],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.getbasetemp()
    server.media = minute_by_ffmpeg(encoding, folder)
    got = fetch_segment(ask(f"sound.{encoding.partition('.')[2]}", start_s, start_s + 10.0))
    heard = decode(tmp_path / "media" / got.source, got.start_s, got.end_s).samples
    assert abs(lag_ms(heard, decode(folder / "sound.wav", start_s, start_s + 10.0).samples)) <= 1.0
    assert len(heard) == pytest.approx(10 * RATE, abs=0.005 * RATE)


def test_the_sound_is_the_originals_own_packets_and_not_an_encoding_of_them(
    server: Misbehaving, ask: Callable[..., Ask], tmp_path: Path
) -> None:
    got = fetch_segment(ask(start_s=0.0, end_s=12.0))
    original = tmp_path / "original.webm"
    original.write_bytes(server.media)
    assert got.source == "ab/-k_1000.webm"
    assert got.sha256 == content_sha256(original)


def test_the_same_source_gives_the_same_bytes_each_time(ask: Callable[..., Ask], server: Misbehaving) -> None:
    for extension in CODECS:
        server.media = minute(extension)
        wanted = ask(f"k.{extension}", 20.0, 30.0)
        first = fetch_segment(wanted)
        data = (wanted.media_root / first.source).read_bytes()
        time.sleep(0.01)
        assert fetch_segment(wanted) == first
        assert (wanted.media_root / first.source).read_bytes() == data


def test_only_the_stretch_is_fetched(server: Misbehaving, ask: Callable[..., Ask]) -> None:
    server.media = minute("wav")
    fetch_segment(ask("k.wav", 30.0, 40.0))
    asked = [request.range.removeprefix("bytes=").split("-") for request in server.requests if request.range]
    assert sum(int(last) - int(first) + 1 for first, last in asked) < len(server.media) / 2


def test_a_site_that_says_from_when_on_it_serves_is_not_asked_before(
    server: Misbehaving, ask: Callable[..., Ask]
) -> None:
    wanted = ask()
    wanted.parts.mkdir(parents=True)
    at = int(time.time()) + 2
    info = {"url": wanted.url, "protocol": "http", "available_at": at}
    _cut_out(_downloader(wanted), info, wanted)
    assert server.requests[0].at >= at


def test_of_a_video_the_sound_alone_is_kept(
    server: Misbehaving, ask: Callable[..., Ask], tmp_path: Path
) -> None:
    (tmp_path / "sound.m4a").write_bytes(minute("m4a"))
    ffmpeg("-f", "lavfi", "-i", "testsrc=size=64x48:rate=5:duration=60", "-i", tmp_path / "sound.m4a",
           "-c:v", "mpeg4", "-c:a", "copy", tmp_path / "video.mp4")  # fmt: skip
    server.behave("k.mp4", Body((tmp_path / "video.mp4").read_bytes(), "video/mp4"))
    server.behave("k.m4a", Body(minute("m4a"), "audio/mp4"))
    from_video = fetch_segment(ask("k.mp4", 30.0, 40.0))
    assert from_video.source == "ab/-k_1000.m4a"
    assert from_video.sha256 == fetch_segment(ask("k.m4a", 30.0, 40.0)).sha256


def test_a_stream_in_pieces_is_cut_as_exactly(
    server: Misbehaving, ask: Callable[..., Ask], tmp_path: Path
) -> None:
    original = tmp_path / "sound.m4a"
    original.write_bytes(minute("m4a"))
    ffmpeg("-i", original, "-c", "copy", "-hls_time", 6, "-hls_list_size", 0, tmp_path / "list.m3u8")
    server.behave("list.m3u8", Body((tmp_path / "list.m3u8").read_bytes(), "application/vnd.apple.mpegurl"))
    for piece in tmp_path.glob("list*.ts"):
        server.behave(piece.name, Body(piece.read_bytes(), "video/mp2t"))
    got = fetch_segment(ask("list.m3u8", 30.0, 40.0))
    assert got.message == ""
    heard = decode(tmp_path / "media" / got.source, got.start_s, got.end_s)
    assert (
        abs(lag_ms(heard.samples, decode(original, 30.0, 40.0).samples)) < 25
    )  # a packet: HLS keeps no priming


def test_whatever_codec_a_site_has_is_kept(
    server: Misbehaving, ask: Callable[..., Ask], tmp_path: Path
) -> None:
    (tmp_path / "sound.wav").write_bytes(minute("wav"))
    for codec, name, arrives in (("pcm_s16be", "k.aiff", ".mka"), ("ac3", "k.ac3", ".mka"), ("alac", "k.mp4", ".m4a"),
                                 ("pcm_mulaw", "k.wav", ".wav"), ("aac", "k.aac", ".m4a")):  # fmt: skip
        ffmpeg("-i", tmp_path / "sound.wav", "-t", 12, "-c:a", codec, tmp_path / name)
        server.behave(name, Body((tmp_path / name).read_bytes(), "audio/x-something"))
        got = fetch_segment(ask(name))
        assert (got.reason, got.message, got.source) == ("", "", f"ab/-k_1000{arrives}")


def test_a_clip_at_another_rate_is_had(server: Misbehaving, ask: Callable[..., Ask]) -> None:
    server.behave("k.wav", Body(encode_media(chirps(12, 16_000), 16_000, "WAV", "PCM_16"), "audio/wav"))
    assert fetch_segment(ask("k.wav")).had


# --- what does not


def no_audio(folder: Path) -> bytes:
    ffmpeg("-f", "lavfi", "-i", "testsrc=size=64x48:rate=5:duration=12", "-c:v", "mpeg4", folder / "v.mp4")
    return (folder / "v.mp4").read_bytes()


HTML = b"<!DOCTYPE html><html><head><title>Sorry</title></head><body>no video here</body></html>"
MISDEEDS = {
    "404": (Status(404), "unavailable"),
    "403": (Status(403), "forbidden"),
    "410": (Status(410), "removed"),
    "429": (Status(429, {"Retry-After": "7"}), "rate-limited"),
    "500": (Status(500), "network"),
    "503": (Status(503), "network"),
    "reset mid-body": (Reset(), "network"),
    "body shorter than promised": (Short(), "network"),
    "stalls": (Stall(), "timeout"),
    "stalls at once": (Stall(0), "timeout"),
    "web page for media": (Body(HTML, "text/html"), "no-audio"),
    "web page that says it is media": (Body(HTML), "no-audio"),
    "empty file": (Body(b""), "empty"),
    "empty file without Range": (Body(b"", ranges=False), "empty"),
    "no media at all": (Body(bytes(range(256)) * 64), "corrupt"),
    "clip shorter than asked": (Body(webm(7.0)), "too-short"),
    "clip that ends before": (Body(webm(0.5)), "too-short"),
    "silent": (Body(webm(12.0, level=0.0)), "silent"),
}


@pytest.mark.parametrize("misdeed", MISDEEDS)
def test_each_misdeed_ends_in_its_reason_and_a_second_try_heals_it(
    misdeed: str, server: Misbehaving, ask: Callable[..., Ask], tmp_path: Path
) -> None:
    behaviour, reason = MISDEEDS[misdeed]
    server.behave("k.webm", behaviour)
    lost = fetch_segment(ask())
    assert (lost.reason, lost.source, lost.had) == (reason, "", False)
    assert lost.message
    assert "\n" not in lost.message
    assert lost.retry_after_s == (7.0 if misdeed == "429" else None)
    assert files(tmp_path) == []
    server.behave("k.webm", Fine())
    healed = fetch_segment(ask())
    assert healed.had
    assert files(tmp_path) == ["media/" + healed.source]


@pytest.mark.parametrize(
    "behaviour",
    [Status(429, {"Retry-After": "7"}), Status(403), Status(500), Reset(), Short(), Stall()],
    ids=["429", "403", "500", "reset", "short", "stall"],
)
def test_a_server_that_turns_bad_once_the_media_are_asked_for_is_told_the_same(
    behaviour: object, server: Misbehaving, ask: Callable[..., Ask]
) -> None:
    server.media = minute("wav")
    server.behave_from("k.wav", behaviour, request=3)  # after yt-dlp's look, and the first block
    expected = {Status: {429: "rate-limited", 403: "forbidden", 500: "network"}, Stall: "timeout"}
    reason = expected.get(type(behaviour), "network")
    got = fetch_segment(ask("k.wav", 40.0, 50.0))
    assert got.reason == (reason if isinstance(reason, str) else reason[behaviour.code])
    assert got.retry_after_s == (7.0 if got.reason == "rate-limited" else None)


def test_a_video_without_audio_is_no_audio(
    server: Misbehaving, ask: Callable[..., Ask], tmp_path: Path
) -> None:
    server.behave("k.mp4", Body(no_audio(tmp_path), "video/mp4"))
    assert fetch_segment(ask("k.mp4")).reason == "no-audio"


def test_a_server_that_is_not_there_is_the_network(ask: Callable[..., Ask]) -> None:
    assert fetch_segment(ask(url="http://127.0.0.1:9/watch/k.webm")).reason == "network"
    assert fetch_segment(ask(url="http://nowhere.invalid/watch/k.webm")).reason == "network"


def test_what_is_short_or_silent_is_kept_where_that_is_wanted(
    server: Misbehaving, ask: Callable[..., Ask]
) -> None:
    server.behave("k.webm", Body(webm(7.0, level=0.0)))
    got = fetch_segment(ask(short_s=5.0, keep_silent=True))
    assert got.had
    assert got.duration_s == pytest.approx(6.0, abs=0.03)
    assert "--keep-silent" in fetch_segment(ask(short_s=5.0)).message
    assert "--allow-short" in fetch_segment(ask(keep_silent=True)).message


# --- in place


def test_what_an_earlier_run_left_goes_away(
    server: Misbehaving, ask: Callable[..., Ask], tmp_path: Path
) -> None:
    wanted = ask()
    old = wanted.media_root / "ab" / "-k_1000.m4a"
    for path in (old, old.with_name("-k_1000x.m4a"), wanted.parts / "half"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"old")
    assert fetch_segment(wanted).source == "ab/-k_1000.webm"
    assert files(tmp_path) == ["media/ab/-k_1000.webm", "media/ab/-k_1000x.m4a"]
    assert not wanted.parts.exists()


def test_a_worker_killed_part_way_leaves_nothing_in_place(
    server: Misbehaving, ask: Callable[..., Ask], tmp_path: Path
) -> None:
    server.media = minute("wav")
    server.behave_from("k.wav", Stall(), request=3)
    wanted = ask("k.wav", 40.0, 50.0, socket_timeout_s=60.0)
    code = f"from pathlib import PosixPath; from clipmill.fetch.segment import *; fetch_segment({wanted!r})"
    worker = subprocess.Popen([sys.executable, "-c", code])
    while len(server.asked("k.wav")) < 3:
        assert worker.poll() is None
        time.sleep(0.02)
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    assert wanted.parts.exists()
    assert files(tmp_path / "media") == []
    server.behave("k.wav", Fine())
    assert fetch_segment(wanted).had
    assert files(tmp_path) == ["media/ab/-k_1000.wav"]


def test_trouble_with_our_own_disk_is_raised_and_not_blamed_on_the_clip(
    ask: Callable[..., Ask], tmp_path: Path
) -> None:
    (tmp_path / "media").write_text("in the way")
    with pytest.raises(OSError, match="media"):
        fetch_segment(ask())


def test_a_disk_that_takes_no_more_is_raised_and_leaves_nothing(
    ask: Callable[..., Ask], tmp_path: Path
) -> None:
    code = (
        "import resource; from pathlib import PosixPath; from clipmill.fetch.segment import *; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); fetch_segment({ask()!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "OSError: [Errno 27] File too large" in done.stderr
    assert files(tmp_path) == []


def test_cookies_are_sent_and_their_file_is_left_as_it_is(
    server: Misbehaving, ask: Callable[..., Ask], tmp_path: Path
) -> None:
    jar = tmp_path / "cookies.txt"
    jar.write_text("# Netscape HTTP Cookie File\n127.0.0.1\tFALSE\t/\tFALSE\t0\tname\tvalue\n")
    before = jar.stat()
    assert fetch_segment(ask(cookies=jar)).had
    assert {request.headers.get("Cookie") for request in server.requests} == {"name=value"}
    assert (jar.stat().st_mtime_ns, jar.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert fetch_segment(ask()).had
    assert "Cookie" not in server.requests[-1].headers


@pytest.mark.parametrize("content", [None, b"no cookies at all\n", b"", b"\xff\xfe\x00"])
def test_cookies_that_cannot_be_read_are_the_users_to_mend(
    content: bytes | None, ask: Callable[..., Ask], tmp_path: Path
) -> None:
    jar = tmp_path / "cookies.txt"
    if content is not None:
        jar.write_bytes(content)
    with pytest.raises(ConfigError, match=r"cookies\.txt.*--cookies"):
        fetch_segment(ask(cookies=jar))


def test_a_proxy_is_asked_instead_of_the_site(server: Misbehaving, ask: Callable[..., Ask]) -> None:
    got = fetch_segment(ask(url="http://nowhere.invalid/watch/k.webm", proxy=server.root))
    assert got.had
    assert {request.headers["Host"] for request in server.requests} == {"nowhere.invalid"}


# --- what the content is


@pytest.mark.parametrize(
    ("extension", "remuxed"),
    [("webm", "ogg"), ("webm", "mka"), ("m4a", "mka"), ("ogg", "webm"), ("flac", "mka")],
)
def test_a_copy_in_another_container_has_the_same_content(
    extension: str, remuxed: str, tmp_path: Path
) -> None:
    one, other = tmp_path / f"one.{extension}", tmp_path / f"other.{remuxed}"
    one.write_bytes(minute(extension))
    ffmpeg("-i", one, "-map", "0:a:0", "-c", "copy", other)
    assert one.read_bytes() != other.read_bytes()
    assert content_sha256(one) == content_sha256(other)


def test_another_sound_another_codec_and_no_sound_at_all_have_other_contents(tmp_path: Path) -> None:
    contents = [webm(), webm(11.0), webm(level=0.5), minute("wav"), b"no media", b"no media either", b""]
    hashes = set()
    for content in contents:
        path = tmp_path / "file"
        path.write_bytes(content)
        hashes.add(content_sha256(path))
    assert len(hashes) == len(contents)
    assert all(len(digest) == 64 for digest in hashes)


def test_importing_the_segment_module_imports_no_yt_dlp() -> None:
    code = "import sys, clipmill.fetch.segment; sys.exit('yt_dlp' in sys.modules or 'av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
