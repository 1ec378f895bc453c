"""The features without complex numbers: the same numbers, in torch and as an ONNX file, at any batch and length."""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipmill.features import FEATURES, create_feature
from clipmill.train.trace import program_of, quiet

RATE = 8000
NAMES = [name for name in FEATURES if name != "logmel"]  # whose twin has a test file of its own

WITHIN = {"mfcc": 5e-3, "gfcc": 1e-5, "chroma": 1e-5, "cqt": 0.1, "tempogram": 1e-4}
"""How far a twin's numbers may be from the feature's; ONNX's from its program's, by a tenth of that."""

SIZES = ((1, 1), (1, RATE // 3), (3, 2 * RATE), (2, round(3.3 * RATE)), (1, 7 * RATE))


def noise(clips: int, samples: int) -> Tensor:
    return 0.1 * torch.randn(clips, samples, generator=torch.Generator().manual_seed(samples))


class All(nn.Module):
    """All twins, to be exported at once: most of an export's time is the same for one and for five."""

    def __init__(self) -> None:
        super().__init__()
        self.twins = nn.ModuleList(create_feature(name, sample_rate=RATE).real() for name in NAMES)

    def forward(self, wave: Tensor) -> tuple[Tensor, ...]:
        return tuple(twin(wave) for twin in self.twins)


@cache
def program() -> torch.export.ExportedProgram:
    return program_of(All().eval(), torch.zeros(2, round(2.317 * RATE)), [0, 1])


@cache
def in_torch(clips: int, samples: int) -> tuple[Tensor, ...]:
    return program().module()(noise(clips, samples))


@pytest.mark.parametrize("rate", [8000, 22050, 44100])
@pytest.mark.parametrize("name", NAMES)
def test_a_twin_gives_the_features_numbers(name: str, rate: int) -> None:
    feature = create_feature(name, sample_rate=rate)
    wave = noise(2, round(1.3 * rate))
    with torch.autocast("cpu", torch.bfloat16):
        found = feature.real()(wave)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    torch.testing.assert_close(found, feature(wave), rtol=0, atol=WITHIN[name])


def test_a_twin_of_other_settings_gives_their_numbers() -> None:
    wave = noise(2, RATE)
    for name, changes in (
        ("mfcc", {"n_mfcc": 20, "n_mels": 40, "n_fft": 300}),
        ("gfcc", {"n_fft": 509, "n_filters": 20, "n_gfcc": 7}),  # a prime
        ("gfcc", {"win_length": 251, "n_fft": 375}),
        ("chroma", {"n_fft": 1155, "n_chroma": 24}),
        ("cqt", {"bins_per_octave": 24, "n_bins": 30, "f_min": 200.0}),
        ("tempogram", {"window_frames": 99}),
    ):
        feature = create_feature(name, sample_rate=RATE, **changes)
        torch.testing.assert_close(feature.real()(wave), feature(wave), rtol=0, atol=WITHIN[name])


@pytest.mark.parametrize(("clips", "samples"), SIZES)
def test_exported_a_twin_takes_any_batch_and_length(clips: int, samples: int) -> None:
    wave = noise(clips, samples)
    for name, found in zip(NAMES, in_torch(clips, samples), strict=True):
        expected = create_feature(name, sample_rate=RATE)(wave)
        torch.testing.assert_close(found, expected, rtol=0, atol=WITHIN[name])


def test_nothing_in_it_is_complex() -> None:
    graphs = [
        part.graph for part in program().graph_module.modules() if isinstance(part, torch.fx.GraphModule)
    ]
    tensors = [node.meta["val"] for graph in graphs for node in graph.nodes if "val" in node.meta]
    assert any(isinstance(tensor, Tensor) for tensor in tensors)
    assert not any(isinstance(tensor, Tensor) and tensor.is_complex() for tensor in tensors)


def test_as_an_onnx_file_it_gives_the_same() -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    with quiet():
        made: Any = torch.onnx.export(
            program(),
            dynamo=True,
            verbose=False,
            opset_version=18,
            dynamic_shapes=({0: "batch", 1: "samples"},),
        )
    assert {node.op_type for node in made.model.graph} & {"STFT", "DFT", "Loop", "If"} == set()
    assert made.model.opset_imports[""] == 18
    file = io.BytesIO()
    made.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    for clips, samples in SIZES:
        found = session.run(None, {session.get_inputs()[0].name: noise(clips, samples).numpy()})
        for name, theirs, ours in zip(NAMES, found, in_torch(clips, samples), strict=True):
            torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=0, atol=WITHIN[name] / 10)
