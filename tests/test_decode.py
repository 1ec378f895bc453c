"""What is claimed of decoding: stretches of long files, channels, changes part-way, headers that lie, the resampler."""

from __future__ import annotations

import struct
import subprocess
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile

from clipmill.audio import decode, resample, to_int16
from clipmill.audio.ffmpeg import ffmpeg_program
from clipmill.errors import DecodeError
from conftest import sound

LONG_S, RATE = 600, 8000


def ffmpeg(*arguments: object) -> None:
    subprocess.run([ffmpeg_program(), "-y", "-loglevel", "error", *map(str, arguments)], check=True)


def bytes_read() -> int:
    """By this process so far, from disk or cache."""
    return int(Path("/proc/self/io").read_text().split()[1])


def pitch(samples: np.ndarray, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(np.argmax(spectrum)) * rate / len(samples)


def sine(hz: float, seconds: float, rate: int, channels: int) -> np.ndarray:
    wave = 0.3 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)
    return np.repeat(wave[:, None], channels, axis=1)


# stretches of long files


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    noise = np.random.default_rng(0).normal(0, 0.1, LONG_S * RATE)
    for suffix in ("wav", "flac", "ogg"):
        with soundfile.SoundFile(folder / f"x.{suffix}", "w", RATE, 1) as file:
            for start in range(0, len(noise), 1 << 14):
                file.write(noise[start : start + (1 << 14)])
    made = {
        "mp3": ("-c:a", "libmp3lame", "-b:a", "16k"),
        "webm": ("-c:a", "libopus", "-b:a", "16k", "-compression_level", 0),
        "m4a": ("-c:a", "aac", "-b:a", "16k"),
        "aac": ("-c:a", "aac", "-b:a", "16k"),
    }
    ffmpeg("-i", folder / "x.wav", *(a for s, codec in made.items() for a in (*codec, folder / f"x.{s}")))
    return folder


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "webm", "m4a"])
def test_a_stretch_at_the_end_of_a_long_file_is_had_without_reading_the_whole(long, suffix):
    path = long / f"x.{suffix}"
    decode(path, 0.0, 1.0)  # what is loaded once is no part of it
    before = bytes_read()
    part = decode(path, LONG_S - 20, LONG_S - 18)
    assert part.duration_s == 2
    assert bytes_read() - before < path.stat().st_size / 4


@pytest.mark.parametrize("suffix", ["mp3", "aac"])
def test_where_a_format_has_no_index_a_stretch_costs_one_reading_of_what_is_before_it(long, suffix):
    path = long / f"x.{suffix}"
    decode(path, 0.0, 1.0)
    before = bytes_read()
    assert decode(path, LONG_S - 20, LONG_S - 18).duration_s == 2
    assert bytes_read() - before < 1.1 * path.stat().st_size


@pytest.mark.parametrize(("suffix", "apart", "late_s"), [
    ("wav", 0, 0), ("flac", 0, 0), ("ogg", 1e-6, 0), ("mp3", 1e-5, 0), ("aac", 1e-6, 0), ("m4a", 1e-6, 0),
    ("webm", 1e-4, 0.001),
])  # fmt: skip
@pytest.mark.parametrize("decoder", ["auto", "ffmpeg"])
def test_a_stretch_of_a_long_file_is_what_the_whole_has_there(long, suffix, apart, late_s, decoder):
    path = long / f"x.{suffix}"
    whole, part = decode(path), decode(path, LONG_S - 20.25, LONG_S - 18.25, decoder)
    assert len(part.samples) == 2 * whole.rate
    first = round((LONG_S - 20.25) * whole.rate)
    late = round(late_s * whole.rate) if decoder == "auto" else round(0.04 * whole.rate) * (suffix == "webm")
    assert apart >= min(
        float(np.abs(whole.samples[first + k :][: len(part.samples)] - part.samples).max())
        for k in range(-late, late + 1)
    )


# channels


@pytest.mark.parametrize("channels", [1, 2, 3, 7, 8, 9, 16, 64])
def test_wav_of_any_number_of_channels_is_their_mean(tmp_path, channels):
    wave = np.random.default_rng(0).normal(0, 0.1, (3000, channels))
    soundfile.write(tmp_path / "x.wav", wave, 44100, "FLOAT")
    audio = decode(tmp_path / "x.wav")
    assert audio.channels == channels
    assert np.allclose(audio.samples, wave.mean(axis=1), atol=1e-6)


@pytest.mark.parametrize("channels", range(1, 9))
@pytest.mark.parametrize(("suffix", "codec"), [("flac", None), ("ogg", "VORBIS"), ("ogg", "OPUS")])
def test_flac_vorbis_and_opus_of_one_to_eight_channels_are_their_mean(tmp_path, suffix, codec, channels):
    path = tmp_path / f"x.{suffix}"
    tones = [sine(300 * (k + 1), 1, 48000, 1)[:, 0] for k in range(channels)]
    soundfile.write(path, np.stack(tones, 1), 48000, codec)
    audio = decode(path)
    assert audio.channels == channels
    assert_mean(audio.samples, 48000, channels)


@pytest.mark.parametrize(("channels", "layout"), [(1, "mono"), (2, "stereo"), (6, "5.1"), (8, "7.1")])
def test_aac_of_up_to_eight_channels_is_their_mean(tmp_path, channels, layout):
    tones = [sine(300 * (k + 1), 1, 48000, 1)[:, 0] for k in range(channels)]
    soundfile.write(tmp_path / "x.wav", np.stack(tones, 1), 48000, "FLOAT")
    ffmpeg(
        "-channel_layout", layout, "-i", tmp_path / "x.wav", "-c:a", "aac", "-b:a", "768k", tmp_path / "x.m4a"
    )
    audio = decode(tmp_path / "x.m4a")
    assert audio.channels == channels
    assert_mean(audio.samples, 48000, channels)


def assert_mean(samples: np.ndarray, rate: int, channels: int) -> None:
    """Each channel's tone, 300 Hz and its multiples, has its level divided by the channels.

    But for one channel of six and more: encoders keep next to nothing of the one for low frequencies.
    """
    middle = samples[rate // 4 : 3 * rate // 4]
    spectrum = np.abs(np.fft.rfft(middle)) * 2 / len(middle)
    kept = [spectrum[150 * (k + 1)] == pytest.approx(0.3 / channels, rel=0.1) for k in range(channels)]
    assert sum(kept) >= channels - (channels >= 6)


def test_opposite_channels_cancel(tmp_path):
    wave = sound(0.5, 44100)
    soundfile.write(tmp_path / "x.wav", np.stack([wave, -wave], 1), 44100, "FLOAT")
    assert not decode(tmp_path / "x.wav").samples.any()


# changes part-way


@pytest.fixture(scope="module")
def joined(tmp_path_factory) -> Path:
    """4 s of 1 kHz, mono at 44.1 kHz, then 3 s of 3 kHz, stereo at 22.05 kHz (both at 48 kHz in Opus)."""
    folder = tmp_path_factory.mktemp("joined")
    soundfile.write(folder / "1.wav", sine(1000, 4, 44100, 1), 44100)
    soundfile.write(folder / "2.wav", sine(3000, 3, 22050, 2), 22050)
    for suffix, codec in {"ogg": "libvorbis", "opus": "libopus", "mp3": "libmp3lame", "aac": "aac"}.items():
        for part in "12":
            ffmpeg("-i", folder / f"{part}.wav", "-c:a", codec, folder / f"{part}.{suffix}")
        both = (folder / f"1.{suffix}").read_bytes() + (folder / f"2.{suffix}").read_bytes()
        (folder / f"both.{suffix}").write_bytes(both)
    return folder


@pytest.mark.parametrize("suffix", ["ogg", "opus", "mp3", "aac"])
@pytest.mark.parametrize(("start", "end", "first_hz", "last_hz"), [
    (None, None, 1000, 3000), (2.0, 3.0, 1000, 1000), (3.5, 4.5, 1000, 3000), (5.0, 6.0, 3000, 3000), (6.5, None, 3000, 3000),
])  # fmt: skip
def test_rate_and_channels_may_change_part_way(joined, suffix, start, end, first_hz, last_hz):
    audio = decode(joined / f"both.{suffix}", start, end)
    # AAC outside a container says nothing of its priming, up to 50 ms in each part.
    assert audio.duration_s == pytest.approx(
        (end or 7.0) - (start or 0.0), abs=0.12 if suffix == "aac" else 0.002
    )
    quarter = len(audio.samples) // 4
    assert pitch(audio.samples[:quarter], audio.rate) == pytest.approx(first_hz, abs=12)
    assert pitch(audio.samples[-quarter:], audio.rate) == pytest.approx(last_hz, abs=12)


@pytest.mark.parametrize("suffix", ["ogg", "opus", "mp3", "aac"])
def test_where_channels_change_the_most_are_told(joined, suffix):
    assert decode(joined / f"both.{suffix}").channels == 2


# headers that lie


def lying(tmp_path: Path, kind: str) -> Path:
    """Two seconds at 8 kHz, of which a header says something else."""
    suffix = kind.split()[0]
    path = tmp_path / f"x.{suffix}"
    soundfile.write(path, sound(2, 8000), 8000)
    data = bytearray(path.read_bytes())
    if kind.startswith("wav size"):
        data[40:44] = int(kind.split()[-1]).to_bytes(4, "little")
    elif kind.startswith("wav channels"):
        data[22:24] = int(kind.split()[-1]).to_bytes(2, "little")
    elif kind.startswith("flac samples"):  # 36 bits at the end of the fields that begin at byte 18
        fields = int.from_bytes(data[18:26], "big") >> 36 << 36 | int(kind.split()[-1])
        data[18:26] = fields.to_bytes(8, "big")
    elif kind.startswith("mp3 frames"):
        at = max(data.find(b"Xing"), data.find(b"Info"))
        data[at + 8 : at + 12] = int(kind.split()[-1]).to_bytes(4, "big")
    elif kind.startswith("ogg granule"):
        at = data.rfind(b"OggS")
        data[at + 6 : at + 14] = int(kind.split()[-1]).to_bytes(8, "little")
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("decoder", ["auto", "ffmpeg"])
@pytest.mark.parametrize("kind", [
    "wav size 0", "wav size 100", "wav size 1000000", "wav size 2000000000", "wav size 4294967295", "wav channels 0",
    "wav channels 65535", "flac samples 0", "flac samples 1", "flac samples 15999", "flac samples 1000000",
    "flac samples 68719476735", "mp3 frames 0", "mp3 frames 3", "mp3 frames 4294967295", "ogg granule 0",
    "ogg granule 100", "ogg granule 4611686018427387904", "ogg granule 18446744073709551615",
])  # fmt: skip
def test_a_header_that_lies_gives_a_clip_or_an_error_and_costs_no_memory(tmp_path, kind, decoder):
    path = lying(tmp_path, kind)
    tracemalloc.start()
    try:
        found = decode(path, decoder=decoder).duration_s
    except DecodeError as error:
        found = error.reason
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert found in ("corrupt", "empty") if isinstance(found, str) else found <= 2.3
    assert peak < 1 << 26


@pytest.mark.parametrize("kind", [
    "wav size 0", "wav size 4294967295", "flac samples 0", "flac samples 1", "flac samples 15999", "mp3 frames 3",
])  # fmt: skip
def test_a_header_that_says_too_little_loses_nothing(tmp_path, kind):
    assert decode(lying(tmp_path, kind)).duration_s == pytest.approx(2.0, abs=0.3)


@pytest.mark.parametrize("kind", ["wav size 1000000", "flac samples 1000000"])
def test_a_header_that_promises_more_than_is_there_is_corrupt(tmp_path, kind):
    with pytest.raises(DecodeError, match="is cut short"):
        decode(lying(tmp_path, kind))


# files that are cut short, and stretches of them


TEN_S = {
    "wav": (), "aiff": (), "flac": (), "mp3": ("-b:a", "64k"), "webm": ("-c:a", "libopus"), "au": (), "w64": (), "caf": (),
    "m4a": ("-c:a", "aac", "-movflags", "+faststart"), "rf64.wav": ("-rf64", "always"), "ima.wav": ("-c:a", "adpcm_ima_wav"),
    "ms.wav": ("-c:a", "adpcm_ms"), "ac3": (), "wma": (), "mpg": ("-c:a", "mp2"),
}  # fmt: skip


@pytest.fixture(scope="module")
def ten(tmp_path_factory) -> Path:
    """Ten seconds of noise, 44.1 kHz, mono, whole as `x.SUFFIX` and the first half of its bytes as `half.SUFFIX`."""
    folder = tmp_path_factory.mktemp("ten")
    soundfile.write(folder / "x.wav", np.random.default_rng(0).normal(0, 0.1, 441_000), 44_100)
    made = [a for suffix, how in TEN_S.items() if suffix != "wav" for a in (*how, folder / f"x.{suffix}")]
    ffmpeg("-i", folder / "x.wav", *made)
    for suffix in TEN_S:
        data = (folder / f"x.{suffix}").read_bytes()
        (folder / f"half.{suffix}").write_bytes(data[: len(data) // 2])
    return folder


@pytest.mark.parametrize("decoder", ["auto", "ffmpeg"])
@pytest.mark.parametrize("suffix", ["mp3", "webm", "au", "w64", "caf", "rf64.wav", "ima.wav", "ms.wav"])
def test_a_cut_file_is_corrupt_whatever_the_decoder(ten, suffix, decoder):
    assert decode(ten / f"x.{suffix}", decoder=decoder).duration_s == pytest.approx(10, abs=0.06)
    with pytest.raises(DecodeError) as caught:
        decode(ten / f"half.{suffix}", decoder=decoder)
    assert caught.value.reason == "corrupt"


@pytest.mark.parametrize("suffix", ["wav", "aiff", "flac", "mp3", "webm", "m4a", "rf64.wav"])
def test_a_stretch_of_a_cut_file_is_had_where_the_sound_is_and_corrupt_where_it_should_be(ten, suffix):
    assert decode(ten / f"half.{suffix}", 1.0, 3.0).duration_s == 2
    for start, end in ((4.0, 8.0), (0.0, 8.0), (7.0, 8.0), (7.0, None)):
        with pytest.raises(DecodeError) as caught:
            decode(ten / f"half.{suffix}", start, end)
        assert caught.value.reason == "corrupt"
    assert decode(ten / f"x.{suffix}", 8.0, 12.0).duration_s == pytest.approx(2, abs=0.06)
    with pytest.raises(DecodeError) as caught:
        decode(ten / f"x.{suffix}", 11.0, 12.0)
    assert caught.value.reason == "too-short"


@pytest.mark.parametrize(("suffix", "sound_as", "picture_as"), [
    ("mp4", ("-c:a", "aac", "-movflags", "+faststart"), "mpeg4"), ("webm", ("-c:a", "libopus"), "libvpx"),
])  # fmt: skip
def test_the_length_of_the_sound_counts_and_not_that_of_a_picture_beside_it(ten, tmp_path, suffix, sound_as, picture_as):  # fmt: skip
    path = tmp_path / f"x.{suffix}"
    for seconds in (10, 15):
        picture = ("-f", "lavfi", "-i", f"testsrc=s=64x64:r=5:d={seconds}", "-c:v", picture_as)
        ffmpeg("-i", ten / "x.wav", *picture, *sound_as, path)
        assert decode(path).duration_s == pytest.approx(10, abs=0.06)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for decoder in ("auto", "ffmpeg"):
        with pytest.raises(DecodeError) as caught:
            decode(path, decoder=decoder)
        assert caught.value.reason == "corrupt"


def id3(name: bytes, content: bytes) -> bytes:
    frame = name + struct.pack(">I", len(content)) + b"\0\0" + content
    size = bytes(len(frame) >> shift & 127 for shift in (21, 14, 7, 0))
    return b"ID3\3\0\0" + size + frame


def test_a_cover_picture_of_any_size_does_not_hide_that_an_mp3_is_cut(ten, tmp_path):
    path = tmp_path / "x.mp3"
    cover = id3(b"APIC", b"\0image/jpeg\0\3\0" + np.random.default_rng(0).bytes(150_000))
    path.write_bytes(cover + (ten / "x.mp3").read_bytes())
    assert decode(path).duration_s == pytest.approx(10, abs=0.06)
    path.write_bytes(cover + (ten / "half.mp3").read_bytes())
    with pytest.raises(DecodeError, match="is cut short"):
        decode(path)


def test_a_title_does_not_make_an_estimate_of_an_mp3s_length_a_promise(tmp_path):
    path = tmp_path / "x.mp3"
    noise = np.random.default_rng(0).normal(0, 0.1, 441_000) * (np.arange(441_000) > 132_300)
    soundfile.write(tmp_path / "x.wav", noise, 44_100)
    ffmpeg("-i", tmp_path / "x.wav", "-q:a", 2, "-write_xing", 0, "-id3v2_version", 0, path)
    path.write_bytes(id3(b"TIT2", b"\0Information hour") + path.read_bytes())
    assert decode(path).duration_s == pytest.approx(10, abs=0.06)


@pytest.mark.parametrize("suffix", ["webm", "mka"])
def test_sound_that_starts_late_or_has_gaps_in_its_container_is_no_cut_file(ten, tmp_path, suffix):
    late, gap = tmp_path / f"late.{suffix}", tmp_path / f"gap.{suffix}"
    ffmpeg("-i", ten / "x.wav", "-c:a", "libopus", "-output_ts_offset", 7, late)
    assert decode(late).duration_s == pytest.approx(10, abs=0.06)
    ffmpeg("-i", ten / "x.wav", "-af", "aselect=not(between(t\\,3\\,6))", "-c:a", "libopus", gap)
    assert decode(gap).duration_s == pytest.approx(7, abs=0.1)


def test_a_webm_with_a_hole_is_corrupt_and_not_one_with_a_gap(ten, tmp_path):
    path = tmp_path / "x.webm"
    data = bytearray((ten / "x.webm").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3000] = np.random.default_rng(0).bytes(3000)
    path.write_bytes(data)
    for start, end in ((None, None), (4.0, 8.0)):
        with pytest.raises(DecodeError, match="is damaged"):
            decode(path, start, end)
    assert decode(path, 1.0, 3.0).duration_s == 2


# damaged FLAC


def test_a_flac_with_one_bit_wrong_is_corrupt(ten, tmp_path):
    rng, whole = np.random.default_rng(3), (ten / "x.flac").read_bytes()
    for _ in range(12):
        data = bytearray(whole)
        data[rng.integers(9000, len(data))] ^= 1 << int(rng.integers(8))
        (tmp_path / "x.flac").write_bytes(data)
        for decoder in ("auto", "ffmpeg"):
            with pytest.raises(DecodeError) as caught:
                decode(tmp_path / "x.flac", decoder=decoder)
            assert caught.value.reason == "corrupt"


@pytest.mark.parametrize("kind", ["bit", "junk", "hole"])
@pytest.mark.parametrize("at", [0.034, 0.5])
def test_a_stretch_of_a_damaged_flac_is_exact_or_corrupt(ten, tmp_path, kind, at):
    path, data = tmp_path / "x.flac", bytearray((ten / "x.flac").read_bytes())
    place = int(at * len(data))
    if kind == "bit":
        data[place] ^= 16
    else:
        data[place : place + 3000] = b"\x5a" * 3000 if kind == "junk" else b""
    path.write_bytes(data)
    reference = soundfile.read(ten / "x.wav", dtype="float32")[0]
    for start, end in ((0, 2), (2, 4), (4, 6), (7, 9), (8, None)):
        if start <= 10 * at < (end or 10):
            with pytest.raises(DecodeError) as caught:
                decode(path, start, end)
            assert caught.value.reason == "corrupt"
        else:
            expected = reference[start * 44_100 : end and end * 44_100]
            assert np.array_equal(decode(path, start, end).samples, expected)


# where seeking lies


@pytest.mark.parametrize("suffix", ["ac3", "wma", "mpg"])
def test_where_places_would_be_reckoned_from_the_bit_rate_a_stretch_is_counted_from_the_start(ten, suffix):
    whole, part = decode(ten / f"x.{suffix}"), decode(ten / f"x.{suffix}", 6.5, 8.25)
    assert np.array_equal(part.samples, whole.samples[round(6.5 * whole.rate) : round(8.25 * whole.rate)])


def test_the_ffmpeg_program_refuses_what_it_would_mix_anew_part_way(joined):
    with pytest.raises(DecodeError) as caught:
        decode(joined / "both.aac", decoder="ffmpeg")
    assert caught.value.reason == "corrupt"


def test_flac_streams_in_ogg_may_follow_each_other(tmp_path):
    parts = []
    for hz, seconds, rate in ((1000, 4, 44100), (3000, 3, 22050)):
        soundfile.write(tmp_path / "x.wav", sine(hz, seconds, rate, 1), rate)
        ffmpeg("-i", tmp_path / "x.wav", "-c:a", "flac", tmp_path / "x.ogg")
        parts.append((tmp_path / "x.ogg").read_bytes())
    path = tmp_path / "both.ogg"
    path.write_bytes(b"".join(parts))
    for start, end, hz in ((None, None, 3000), (2.0, None, 3000), (5.0, 6.0, 3000), (2.0, 3.0, 1000)):
        audio = decode(path, start, end)
        assert audio.duration_s == pytest.approx((end or 7.0) - (start or 0.0), abs=0.002)
        assert pitch(audio.samples[-audio.rate // 2 :], audio.rate) == pytest.approx(hz, abs=12)


# memory


@pytest.mark.parametrize("channels", [1, 2])
def test_a_long_sound_is_never_in_memory_twice(tmp_path, channels):
    path = tmp_path / "x.wav"
    soundfile.write(path, np.zeros((240 * 48_000, channels), np.int16), 48_000)
    tracemalloc.start()
    try:
        audio = decode(path)
        decoding = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        samples = to_int16(audio.samples)
        rounding = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert decoding < 1.5 * audio.samples.nbytes
    assert rounding < 1.2 * (audio.samples.nbytes + samples.nbytes)


# the resampler: docs/audio.md has the figures, benchmarks/resampler.py measures them


@pytest.mark.parametrize(
    ("rate_from", "rate_to"), [(48000, 44100), (22050, 44100), (96000, 44100), (44100, 32000)]
)
def test_tones_up_to_nine_tenths_of_the_band_pass_within_a_fiftieth_of_a_decibel_and_leave_nothing_else(
    rate_from, rate_to
):
    for share in (0.02, 0.3, 0.6, 0.9):
        hz = share * min(rate_from, rate_to) / 2
        level, rest = level_and_rest(resample(tone(hz, rate_from), rate_from, rate_to), hz, rate_to)
        assert abs(20 * np.log10(level)) < 0.02
        assert rest < -125


@pytest.mark.parametrize(("rate_from", "rate_to"), [(48000, 44100), (96000, 44100), (44100, 32000)])
def test_tones_above_the_new_band_are_gone(rate_from, rate_to):
    for share in (1.0, 1.02, 0.49 * rate_from / (rate_to / 2)):
        result = resample(tone(share * rate_to / 2, rate_from), rate_from, rate_to)[
            rate_to // 2 : -rate_to // 2
        ]
        assert 10 * np.log10(2 * np.mean(result.astype(np.float64) ** 2) + 1e-30) < -100


def test_rounding_to_sixteen_bits_is_the_only_noise_that_resampling_leaves():
    result = to_int16(resample(tone(997, 48000, 0.891), 48000, 44100)).astype(np.float32) / 32768
    assert level_and_rest(result, 997, 44100)[1] == pytest.approx(-98.1, abs=0.3)


@pytest.mark.parametrize("rate", [8000, 22050, 48000, 192000])
def test_resampling_does_not_move_a_click(rate):
    click = np.zeros(rate, np.float32)
    click[rate // 2] = 1.0
    heard = resample(click, rate, 44100).astype(np.float64) ** 2
    assert np.average(np.arange(44100), weights=heard) == pytest.approx(22050, abs=0.01)


def tone(hz: float, rate: int, level: float = 1.0) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hz * np.arange(2 * rate) / rate)).astype(np.float32)


def level_and_rest(result: np.ndarray, hz: float, rate: int) -> tuple[float, float]:
    """A tone's amplitude, and all else in dB re a full-scale tone, away from the ends."""
    heard = result[rate // 2 : -rate // 2].astype(np.float64)
    angle = 2 * np.pi * hz * np.arange(len(heard)) / rate
    basis = np.stack([np.sin(angle), np.cos(angle)], axis=1)
    parts = np.linalg.lstsq(basis, heard, rcond=None)[0]
    rest = heard - basis @ parts
    return float(np.hypot(*parts)), float(10 * np.log10(2 * np.mean(rest**2)))
