"""The log-mel without complex numbers: the same numbers as clipmill's own, and fit for export."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipmill.features import LogMel
from clipmill_models import ModelError
from clipmill_models.logmel import RealLogMel, mel_filterbank, mirror_ends

PANNS: dict[str, Any] = {
    "sample_rate": 32000, "n_fft": 1024, "win_length": 1024, "hop": 320, "f_min": 50.0, "f_max": 14000.0, "n_mels": 64,
}  # fmt: skip


def noise(*shape: int) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def dynamic() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)


# The numbers


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 32000, 44100, 48000])
@pytest.mark.parametrize("seconds", [0.01, 1.0, 2.3])
def test_with_128_frames_a_second_it_is_clipmills_log_mel(rate: int, seconds: float) -> None:
    ours = LogMel(sample_rate=rate)
    wave = noise(2, int(rate * seconds))
    mine = RealLogMel(**ours.config, frames_per_s=128)(wave)
    assert mine.shape == (2, 128, ours.frames(wave.shape[1]))
    torch.testing.assert_close(mine, ours(wave), rtol=0, atol=0.02)


def test_clips_whose_last_frames_lie_behind_their_end_are_padded_as_clipmill_pads_them() -> None:
    # 345 samples a frame are more than 44,100 / 128: from 6 s on, whole seconds end before their last frame.
    ours = LogMel()
    wave = noise(1, 44100 * 10 - 7)
    torch.testing.assert_close(
        RealLogMel(**ours.config, frames_per_s=128)(wave), ours(wave), rtol=0, atol=0.02
    )


@pytest.mark.parametrize(
    "changes", [{"mel_scale": "htk"}, {"mel_norm": None}, {"n_fft": 2048}, {"floor": 1e-4}]
)
def test_every_other_setting_is_clipmills_too(changes: dict[str, Any]) -> None:
    ours = LogMel(sample_rate=44100, n_mels=40, **changes)
    wave = noise(1, 30000)
    torch.testing.assert_close(
        RealLogMel(**ours.config, frames_per_s=128)(wave), ours(wave), rtol=0, atol=0.02
    )


@pytest.mark.parametrize("samples", [513, 640, 6399, 6400])
@pytest.mark.parametrize("win_length", [1024, 1000, 640])
def test_without_whole_seconds_it_is_torchs_centred_transform(samples: int, win_length: int) -> None:
    model = RealLogMel(**{**PANNS, "win_length": win_length})
    wave = noise(2, samples)
    window = torch.hann_window(win_length)
    spectrum = torch.stft(wave, 1024, 320, win_length, window, center=True, return_complex=True)
    filters = torchaudio.functional.melscale_fbanks(513, 50.0, 14000.0, 64, 32000, "slaney", "slaney")
    expected = 10 * (spectrum.abs().square().transpose(1, 2) @ filters).clamp(min=1e-10).log10().transpose(
        1, 2
    )
    assert expected.shape[2] == model.frames(samples) == samples // 320 + 1
    torch.testing.assert_close(model(wave), expected, rtol=0, atol=0.02)


def test_silence_is_the_floor() -> None:
    assert torch.equal(RealLogMel(**PANNS)(torch.zeros(1, 3200)), torch.full((1, 64, 11), -100.0))


@settings(max_examples=40, deadline=None)
@given(
    sample_rate=st.sampled_from([8000, 11025, 16000, 22050, 44100]),
    n_fft=st.integers(64, 2048),
    f_min=st.floats(0, 900),
    f_max=st.floats(1000, 4000),
    n_mels=st.integers(1, 128),
    mel_scale=st.sampled_from(["slaney", "htk"]),
    mel_norm=st.sampled_from(["slaney", None]),
)
@pytest.mark.filterwarnings("ignore:At least one mel filterbank")
def test_the_mel_filters_are_torchaudios(
    sample_rate: int,
    n_fft: int,
    f_min: float,
    f_max: float,
    n_mels: int,
    mel_scale: str,
    mel_norm: str | None,
) -> None:
    mine = mel_filterbank(
        sample_rate=sample_rate, n_fft=n_fft, f_min=f_min, f_max=f_max, n_mels=n_mels,
        mel_scale=mel_scale, mel_norm=mel_norm,
    )  # fmt: skip
    theirs = torchaudio.functional.melscale_fbanks(
        n_fft // 2 + 1, f_min, f_max, n_mels, sample_rate, mel_norm, mel_scale
    )
    assert mine.dtype == torch.float64
    # Theirs are float32 throughout: a narrow filter's slope magnifies the rounding of its edges.
    scale = theirs.max().clamp(min=1e-6)
    torch.testing.assert_close(mine.float() / scale, theirs / scale, rtol=0, atol=5e-3)


# Its types and devices


def test_it_stays_float32_under_autocast_and_in_a_bfloat16_network() -> None:
    model, wave = RealLogMel(**PANNS), noise(1, 8000)
    expected = model(wave)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(wave), expected)
    assert torch.equal(model.to(torch.bfloat16)(wave), expected)


def test_it_adds_nothing_to_a_checkpoint() -> None:
    assert RealLogMel(**PANNS).state_dict() == {}
    assert list(RealLogMel(**PANNS).parameters()) == []


def test_built_on_the_meta_device_it_is_right_once_it_is_moved_off_it() -> None:
    with torch.device("meta"):
        model = RealLogMel(**PANNS)
    assert model(torch.empty(3, 6400, device="meta")).shape == (3, 64, 21)
    wave = noise(1, 6400)
    assert torch.equal(model.to_empty(device="cpu")(wave), RealLogMel(**PANNS)(wave))


def test_gradients_reach_the_waveform() -> None:
    wave = noise(1, 4000).requires_grad_()
    RealLogMel(**PANNS)(wave).sum().backward()
    assert wave.grad is not None
    assert wave.grad.isfinite().all()
    assert wave.grad.any()


# Compilers and export


def test_compiles_once_for_all_sizes_without_graph_breaks() -> None:
    model = RealLogMel(**LogMel(sample_rate=16000).config, frames_per_s=128)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    torch._dynamo.utils.counters.clear()
    for clips, samples in ((2, 20000), (3, 16000), (2, 40001)):
        wave = noise(clips, samples)
        torch.testing.assert_close(compiled(wave), model(wave), rtol=0, atol=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("frames_per_s", [128, None])
def test_exported_to_onnx_it_takes_any_size_and_knows_no_complex_numbers(frames_per_s: int | None) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    # At 44.1 kHz, clips from 6 s on take the other branch of the padding.
    model = RealLogMel(**LogMel().config, frames_per_s=frames_per_s).eval()
    program = torch.onnx.export(
        model, (noise(2, 50000),), dynamo=True, dynamic_shapes=dynamic(), verbose=False
    )
    assert program is not None
    assert {node.op_type for node in program.model.graph} & {"STFT", "DFT", "Loop", "If"} == set()
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    for clips, samples in ((1, 1000), (3, 44101), (1, 44100 * 7)):
        wave = noise(clips, samples)
        (found,) = session.run(None, {session.get_inputs()[0].name: wave.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(wave), rtol=0, atol=0.02)


# Clips of a padded batch


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(513, 3000), min_size=1, max_size=4))
def test_mirrored_at_their_own_ends_clips_sound_as_they_do_alone(lengths: list[int]) -> None:
    model, batch = RealLogMel(**PANNS), noise(len(lengths), max(lengths))
    found = model(mirror_ends(batch, torch.tensor(lengths), PANNS["n_fft"]))
    for clip, length in enumerate(lengths):
        alone = model(batch[clip : clip + 1, :length])[0]
        torch.testing.assert_close(found[clip, :, : alone.shape[1]], alone, rtol=0, atol=0.01)


def test_weights_assigned_to_an_outline_find_the_constants_made() -> None:
    wave = torch.randn(1, 3200, generator=torch.Generator().manual_seed(0))
    with torch.device("meta"):
        outline = RealLogMel(**PANNS)
    outline.load_state_dict({}, assign=True)
    assert torch.equal(outline(wave), RealLogMel(**PANNS)(wave))


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hop": 0}, "hop is 0: allowed is any whole number from 1 up"),
        ({"win_length": 1025}, "win_length is 1025 and n_fft 1024: allowed is 2 <= win_length <= n_fft"),
        ({"f_max": 16001.0}, r"f_max 16001.0 Hz .* allowed is 0 <= f_min < f_max <= 16000.0"),
        ({"floor": 0.0}, "a floor above 0"),
        ({"mel_scale": "bark"}, "mel_scale is 'bark' .* allowed are 'slaney' or 'htk'"),
        (
            {"frames_per_s": 99},
            "frames_per_s is 99 with a hop of 320 at 32000 Hz: allowed is 100 and more, or None",
        ),
    ],
)
def test_settings_that_cannot_be_are_told_what_is_allowed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        RealLogMel(**{**PANNS, **changes})


@pytest.mark.parametrize(
    "wave",
    [*(torch.zeros(s) for s in ((3200,), (1, 1, 3200), (1, 512))), torch.zeros(1, 3200, dtype=torch.int16)],
)
def test_a_waveform_that_cannot_be_is_told_what_is_allowed(wave: Tensor) -> None:
    allowed = r"allowed is floating point of shape \[batch, samples\] with at least 513 samples"
    with pytest.raises(ModelError, match=allowed):
        RealLogMel(**PANNS)(wave)
