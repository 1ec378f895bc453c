"""Sound files block by block: the samples of `prepare_clip`, its failures, and memory that does not grow."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from clipmill.audio import prepare_clip, stream
from clipmill.audio.media import encode_media
from clipmill.audio.stream import ClipStream
from clipmill.errors import DecodeError
from conftest import SHARED, sound

KINDS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_24"),
    "ogg": ("OGG", "VORBIS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "webm": ("webm", "libopus"),
    "m4a": ("ipod", "aac"),
}


def made(path: Path, seconds: float, rate: int = 24000, channels: int = 2, seed: int = 0) -> Path:
    samples = sound(seconds, rate, channels, seed).astype(np.float32).reshape(-1, channels).T
    path.write_bytes(encode_media(samples, rate, *KINDS[path.suffix[1:]]))
    return path


def streamed(path: Path, rate: int) -> tuple[np.ndarray, float]:
    clip = ClipStream(path, rate)
    return np.concatenate(list(clip)), clip.duration_s


def whole(path: Path, rate: int) -> tuple[np.ndarray, float]:
    clip = prepare_clip(path, rate)
    return clip.samples[: clip.content], clip.duration_s


def told(function: Callable[[Path, int], Any], path: Path) -> tuple[Any, Any]:
    """What a function says of a file; the reason and message where it fails."""
    try:
        return function(path, 16000)
    except DecodeError as error:
        return error.reason, str(error)


def failure(path: Path, rate: int = 16000) -> tuple[str, str]:
    with pytest.raises(DecodeError) as caught:
        list(ClipStream(path, rate))
    return caught.value.reason, str(caught.value)


@pytest.mark.parametrize("held_s", [60.0, 0.0], ids=["short", "long"])
@pytest.mark.parametrize("suffix", KINDS)
def test_every_sample_is_that_of_the_whole_file(tmp_path, monkeypatch, suffix, held_s):
    monkeypatch.setattr(stream, "HELD_S", held_s)
    monkeypatch.setattr(stream, "_READ", 10_000)  # many blocks of a short file
    monkeypatch.setattr(stream, "_BLOCK", 3_000)
    path = made(tmp_path / f"a.{suffix}", 3.3)
    for rate in (24000, 44100, 16000):
        (samples, duration_s), (expected, expected_s) = streamed(path, rate), whole(path, rate)
        assert duration_s == pytest.approx(expected_s)
        # How soxr's input is cut can decide the last bit.
        np.testing.assert_allclose(samples, expected, rtol=0, atol=0 if rate == 24000 else 1)


@pytest.mark.parametrize("held_s", [60.0, 0.0], ids=["short", "long"])
@pytest.mark.parametrize("suffix", ["ogg", "mp3"])
def test_streams_that_follow_each_other_are_heard_to_the_last(tmp_path, monkeypatch, suffix, held_s):
    monkeypatch.setattr(stream, "HELD_S", held_s)
    one, two = (
        made(tmp_path / f"{n}.{suffix}", 1.5 + n, rate, seed=n) for n, rate in enumerate((24000, 44100))
    )
    path = tmp_path / f"both.{suffix}"
    path.write_bytes(one.read_bytes() + two.read_bytes())
    (samples, duration_s), (expected, expected_s) = streamed(path, 16000), whole(path, 16000)
    assert duration_s == pytest.approx(expected_s)
    assert duration_s > 2.4
    assert np.abs(samples.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("held_s", [60.0, 0.0], ids=["short", "long"])
@pytest.mark.parametrize("suffix", ["wav", "flac", "webm", "m4a"])
def test_a_cut_file_fails_as_the_whole_does(tmp_path, monkeypatch, suffix, held_s):
    monkeypatch.setattr(stream, "HELD_S", held_s)
    path = made(tmp_path / f"a.{suffix}", 3.3)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(DecodeError) as caught:
        prepare_clip(path, 16000)
    assert failure(path) == (caught.value.reason, str(caught.value))
    assert caught.value.reason == "corrupt"


def test_a_long_file_gives_its_sound_until_it_proves_to_be_damaged(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, sound(150, 8000), 8000)
    data = bytearray(path.read_bytes())
    data[len(data) * 9 // 10] ^= 0xFF
    path.write_bytes(data)
    clip = ClipStream(path, 8000)
    blocks = []
    with pytest.raises(DecodeError) as caught:
        blocks.extend(iter(clip))
    assert caught.value.reason == "corrupt"
    assert 100 < clip.duration_s < 140


def test_what_cannot_be_opened_says_why(tmp_path):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("no sound\n" * 100)
    assert failure(tmp_path / "empty.wav")[0] == "empty"
    assert failure(tmp_path / "gone.wav")[0] == "missing"
    assert failure(tmp_path)[0] == "unreadable"
    assert failure(tmp_path / "text.wav")[0] == "corrupt"
    soundfile.write(tmp_path / "nan.wav", np.full(1000, np.nan), 8000, "FLOAT")
    assert failure(tmp_path / "nan.wav")[0] == "corrupt"


def two_hours(path: Path, says: int = 8000) -> Path:
    """Zeros at 8 kHz that take no room, under a header that `says` another rate."""
    soundfile.write(path, np.zeros(8000, np.int16), 8000)
    head = bytearray(path.read_bytes()[:44])
    size = 2 * 7200 * 8000
    head[4:8], head[40:44] = (size + 36).to_bytes(4, "little"), size.to_bytes(4, "little")
    head[24:28] = says.to_bytes(4, "little")
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(44 + size)
    return path


def test_a_rate_that_cannot_be_is_told_before_a_minute_of_it_is_held(tmp_path):
    path = two_hours(tmp_path / "a.wav", says=2_000_000_000)
    tracemalloc.start()
    try:
        reason, message = failure(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert reason == "corrupt"
    assert message == "says its rate is 2000000000 Hz; allowed are 1000 to 1000000"
    assert peak < 20e6


def test_memory_does_not_grow_with_the_length(tmp_path):
    clip = ClipStream(two_hours(tmp_path / "two hours.wav"), 8000)
    tracemalloc.start()
    try:
        samples = sum(len(block) for block in clip)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert samples == 7200 * 8000
    assert clip.duration_s == 7200
    assert peak < 40e6, "all of it would be 115 MB of int16, and 345 MB with the float32 before"


@pytest.mark.shared_data
@pytest.mark.parametrize("held_s", [60.0, 0.0], ids=["short", "long"])
def test_files_made_to_break_decoders_give_the_same_samples_or_the_same_words(monkeypatch, held_s):
    monkeypatch.setattr(stream, "HELD_S", held_s)
    for path in sorted((SHARED / "nasty").rglob("*.*")):
        (found, found_s), (expected, expected_s) = told(streamed, path), told(whole, path)
        if isinstance(expected, str) or isinstance(found, str):
            assert (found, found_s) == (expected, expected_s), path
        else:
            assert found_s == pytest.approx(expected_s), path
            assert np.abs(found.astype(int) - expected).max() <= (0 if held_s else 1), path
