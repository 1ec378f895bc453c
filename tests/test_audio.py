"""Decoding, conversion and encoding: exact where it can be, measured against ffmpeg where not."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from clipmill.audio import (
    decode,
    encode,
    measure,
    pad_to_seconds,
    prepare_clip,
    resample,
    to_int16,
)
from clipmill.audio.media import encode_media
from clipmill.errors import ConfigError, DecodeError
from conftest import SHARED, sound


def snr_db(reference: np.ndarray, other: np.ndarray) -> float:
    """Signal to noise ratio of `other` as an approximation of `reference`."""
    noise = float(((reference - other) ** 2).sum())
    return 10 * np.log10(float((reference**2).sum()) / max(noise, 1e-30))


@pytest.fixture
def opus(tmp_path: Path) -> Path:
    path = tmp_path / "x.webm"
    path.write_bytes(encode_media(sound(6, 48000, 2).T.astype(np.float32), 48000, "webm", "libopus"))
    return path


@pytest.mark.parametrize(("suffix", "subtype", "rate", "channels"), [
    ("wav", "PCM_U8", 11025, 1), ("wav", "PCM_16", 44100, 1), ("wav", "PCM_24", 96000, 2), ("wav", "FLOAT", 48000, 6),
    ("flac", "PCM_16", 44100, 2), ("flac", "PCM_24", 88200, 1), ("ogg", "VORBIS", 44100, 2), ("mp3", None, 44100, 2),
])  # fmt: skip
def test_in_process_decoding_agrees_with_the_ffmpeg_program(tmp_path, suffix, subtype, rate, channels):
    path = tmp_path / f"x.{suffix}"
    soundfile.write(path, sound(2.3, rate, channels), rate, subtype)
    ours, oracle = decode(path), decode(path, decoder="ffmpeg")
    assert (ours.rate, ours.channels) == (oracle.rate, oracle.channels) == (rate, channels)
    assert abs(len(ours.samples) - len(oracle.samples)) <= 1152 * (suffix == "mp3")
    shared = min(len(ours.samples), len(oracle.samples))
    assert snr_db(oracle.samples[:shared], ours.samples[:shared]) > 60


def test_opus_in_webm_and_aac_in_m4a_decode_like_ffmpeg_does(tmp_path, opus):
    m4a = tmp_path / "x.m4a"
    m4a.write_bytes(encode_media(sound(3, 44100, 2).T.astype(np.float32), 44100, "ipod", "aac"))
    for path in (opus, m4a):
        ours, oracle = decode(path), decode(path, decoder="ffmpeg")
        assert len(ours.samples) == len(oracle.samples)
        assert snr_db(oracle.samples, ours.samples) > 60


def test_sixteen_bit_mono_at_the_shards_rate_passes_through_bit_for_bit(tmp_path):
    samples = np.random.default_rng(0).integers(-32768, 32768, 44100, dtype=np.int16)
    soundfile.write(tmp_path / "x.wav", samples, 44100, "PCM_16")
    assert np.array_equal(prepare_clip(tmp_path / "x.wav", 44100).samples, samples)


def test_mono_is_the_mean_of_the_channels(tmp_path):
    wave = sound(0.5, 44100, 6)
    soundfile.write(tmp_path / "x.wav", wave, 44100, "DOUBLE")
    assert np.allclose(decode(tmp_path / "x.wav").samples, wave.mean(axis=1), atol=1e-6)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_a_stretch_is_the_same_samples_as_in_the_whole(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    soundfile.write(path, sound(5, 44100), 44100)
    whole, part = decode(path), decode(path, 1.5, 3.25)
    assert len(part.samples) == round(1.75 * 44100)
    assert np.allclose(part.samples, whole.samples[66150 : 66150 + len(part.samples)], atol=2e-4)


def test_a_stretch_of_a_webm_is_cut_where_asked_to_the_containers_millisecond(opus):
    whole, part = decode(opus), decode(opus, 2.5, 4.0)
    assert len(part.samples) == 72000
    shifts = [snr_db(whole.samples[120000 + k : 192000 + k], part.samples) for k in range(-48, 49)]
    assert max(shifts) > 30


def test_a_stretch_past_the_end_is_cut_there_and_one_that_begins_there_is_too_short(tmp_path):
    soundfile.write(tmp_path / "x.wav", sound(2, 8000), 8000)
    assert decode(tmp_path / "x.wav", 1.5, 9.0).duration_s == 0.5
    with pytest.raises(DecodeError) as caught:
        decode(tmp_path / "x.wav", 2.5)
    assert caught.value.reason == "too-short"


def test_a_stretch_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no stretch from 3 s to 2 s"):
        decode(tmp_path / "x.wav", 3.0, 2.0)


def broken(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / f"{kind}.wav"
    if kind == "no-bytes":
        path.write_bytes(b"")
    elif kind == "no-samples":
        soundfile.write(path, np.zeros(0), 44100)
    elif kind == "garbage":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif kind == "truncated-flac":
        soundfile.write(tmp_path / "x.flac", sound(3, 44100), 44100)
        whole = (tmp_path / "x.flac").read_bytes()
        path = tmp_path / "half.flac"
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "picture":
        import matplotlib.image

        path = tmp_path / "x.png"
        matplotlib.image.imsave(path, np.zeros((8, 8)))
    elif kind == "not-finite":
        soundfile.write(path, np.array([0.0, np.nan, np.inf]), 44100, "FLOAT")
    return path


@pytest.mark.parametrize("suffix", ["wav", "aiff", "flac", "mp3", "webm", "m4a"])
def test_a_file_that_is_cut_in_half_is_corrupt_and_never_half_a_clip(tmp_path, suffix):
    whole, half = tmp_path / f"whole.{suffix}", tmp_path / f"half.{suffix}"
    wave = sound(6, 48000)
    if suffix in ("webm", "m4a"):
        container, codec = {"webm": ("webm", "libopus"), "m4a": ("ipod", "aac")}[suffix]
        whole.write_bytes(encode_media(wave[None].astype(np.float32), 48000, container, codec))
    else:
        soundfile.write(whole, wave, 48000)
    assert decode(whole).duration_s == pytest.approx(6.0, abs=0.06)
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(DecodeError) as caught:
        decode(half)
    assert caught.value.reason == "corrupt"


def test_a_flac_with_a_hole_is_corrupt(tmp_path):
    path = tmp_path / "x.flac"
    soundfile.write(path, sound(6, 44100), 44100)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3000] = bytes(3000)
    path.write_bytes(data)
    with pytest.raises(DecodeError):
        decode(path)


def test_a_wav_written_to_a_pipe_whose_sizes_were_never_known_is_whole(tmp_path):
    path = tmp_path / "x.wav"
    soundfile.write(path, sound(1, 8000), 8000)
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    assert decode(path).duration_s == 1.0


@pytest.mark.parametrize("rate", [1, 7, 2_000_000_000])
def test_a_header_whose_rate_no_sound_has_is_corrupt_and_costs_no_memory(tmp_path, rate):
    path = tmp_path / "x.wav"
    soundfile.write(path, sound(1, 8000), 8000)
    data = bytearray(path.read_bytes())
    data[24:28] = rate.to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(DecodeError, match=f"says its rate is {rate} Hz"):
        decode(path)


def test_samples_that_overflow_when_resampled_are_corrupt(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.where(np.arange(22050) % 7, 3e38, -3e38), 22050, "FLOAT")
    with pytest.raises(DecodeError, match="too large"):
        prepare_clip(tmp_path / "x.wav", 44100)


def test_a_pipe_is_no_file_and_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "x.wav")
    with pytest.raises(DecodeError, match="no regular file"):
        decode(tmp_path / "x.wav")


@pytest.mark.parametrize(("kind", "reason"), [
    ("missing", "missing"), ("no-bytes", "empty"), ("no-samples", "empty"), ("garbage", "corrupt"),
    ("truncated-flac", "corrupt"), ("picture", "no-audio"), ("not-finite", "corrupt"),
])  # fmt: skip
@pytest.mark.parametrize("decoder", ["auto", "ffmpeg"])
def test_what_cannot_be_decoded_has_a_reason(tmp_path, kind, reason, decoder):
    with pytest.raises(DecodeError) as caught:
        decode(broken(tmp_path, kind), decoder=decoder)
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


def test_decoders_print_nothing(tmp_path, capfd):
    soundfile.write(tmp_path / "x.mp3", sound(1, 44100), 44100)
    whole = (tmp_path / "x.mp3").read_bytes()
    for name, data in (
        ("cut", whole[:3000]),
        ("holes", whole[:4000] + b"\0" * 900 + whole[4900:]),
        ("junk", b"\xff\xfb" * 999),
    ):
        path = tmp_path / f"{name}.mp3"
        path.write_bytes(data)
        with contextlib.suppress(DecodeError):
            decode(path)
    assert capfd.readouterr() == ("", "")


@given(st.integers(1, 200_000), st.sampled_from([8000, 11025, 16000, 22050, 32000, 44100, 48000, 96000]))
def test_resampling_keeps_durations_to_the_sample(samples, rate):
    result = resample(np.zeros(samples, np.float32), rate, 44100)
    assert len(result) == -(-samples * 44100 // rate)
    assert len(result) / 44100 - samples / rate < 1 / 44100


@given(st.integers(0, 100_000), st.sampled_from([1000, 8000, 44100]))
def test_padding_appends_only_zeros_up_to_the_next_whole_second(samples, rate):
    clip = np.ones(samples, np.int16)
    padded = pad_to_seconds(clip, rate)
    assert len(padded) % rate == 0
    assert len(padded) > 0
    assert len(padded) - samples < rate or samples == 0
    assert padded[:samples].all()
    assert not padded[samples:].any()


def test_a_sine_survives_resampling_and_a_tone_above_the_new_band_does_not():
    time = np.arange(96000) / 96000
    kept, gone = (np.sin(2 * np.pi * f * time).astype(np.float32) for f in (10_000, 30_000))
    inner = slice(2000, 42000)
    expected = np.sin(2 * np.pi * 10_000 * np.arange(44100) / 44100)
    assert snr_db(expected[inner], resample(kept, 96000, 44100)[inner]) > 90
    assert np.abs(resample(gone, 96000, 44100)[inner]).max() < 1e-4


@given(st.lists(st.integers(-32768, 32767), min_size=1, max_size=50))
def test_int16_to_float_and_back_is_exact(values):
    samples = np.array(values, np.int16)
    assert np.array_equal(to_int16(samples.astype(np.float32) / 32768), samples)


def test_peaks_beyond_full_scale_are_clipped_not_wrapped():
    assert to_int16(np.array([7.85, -7.85], np.float32)).tolist() == [32767, -32768]


@pytest.mark.parametrize("encoding", ["flac", "pcm16"])
def test_encoding_is_lossless_and_repeatable(encoding):
    samples = to_int16(sound(1, 44100).astype(np.float32))
    data = encode(samples, 44100, encoding)
    back, rate = soundfile.read(io.BytesIO(data), dtype="int16")
    assert rate == 44100
    assert np.array_equal(back, samples)
    assert encode(samples, 44100, encoding) == data


def test_loudness_of_a_full_scale_997_hz_sine_is_minus_three_lufs():
    # ITU-R BS.1770-4: a 0 dBFS 997 Hz sine in one front channel reads -3.01 LKFS.
    sine = to_int16(np.sin(2 * np.pi * 997 * np.arange(5 * 48000) / 48000).astype(np.float32))
    found = measure(sine, 48000)
    assert found["loudness_lufs"] == pytest.approx(-3.01, abs=0.1)
    assert found["rms_db"] == pytest.approx(-3.01, abs=0.01)
    assert found["peak_db"] == pytest.approx(0.0, abs=0.01)


def test_levels_of_nothing_are_finite_and_its_loudness_is_none():
    found = measure(np.zeros(44100, np.int16), 44100)
    assert (found["peak_db"], found["rms_db"], found["loudness_lufs"]) == (-120.0, -120.0, None)
    assert measure(np.ones(100, np.int16), 44100)["loudness_lufs"] is None


@pytest.mark.shared_data
def test_a_flac_whose_header_promises_too_few_samples_is_read_to_its_end():
    audio = decode(SHARED / "nasty/flac/05 - wrong total number of samples.flac")
    assert len(audio.samples) == 109_487  # the header says 39 842


@pytest.mark.shared_data
def test_an_mp3_whose_channel_count_changes_part_way_is_read_to_its_end():
    audio = decode(SHARED / "nasty/mp3/l3-he_mode.bit")
    assert len(audio.samples) == 147_456
    assert audio.channels == 2


@pytest.mark.shared_data
@pytest.mark.parametrize("name", ["03 - wrong bit depth", "07 - other metadata blocks preceding streaminfo metadata block"])  # fmt: skip
def test_a_stretch_of_a_flac_that_ffmpeg_refuses_is_what_the_whole_has_there(name):
    path = SHARED / f"nasty/flac/{name}.flac"
    whole, part = decode(path), decode(path, 0.5, 1.5)
    assert np.array_equal(part.samples, whole.samples[whole.rate // 2 :][: whole.rate])
