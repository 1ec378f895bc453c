"""AST: the papers' counts by its parts, what its features are, and what it must bear."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipmill.features import LogMel
from clipmill_models import ModelError, count_parameters, multiply_adds
from clipmill_models.ast import Ast

transformers = pytest.importorskip("transformers")

IMAGENET_HEADS = 2 * (768 * 1000 + 1000)
"""Parameters of the two heads that the original keeps from ImageNet and never calls."""

WIDTH, HIDDEN, LAYERS = 768, 3072, 12


@pytest.fixture(scope="module")
def model() -> Ast:
    torch.manual_seed(0)
    network = Ast("ast-512", num_classes=5).eval()
    # Two of its twelve layers: what is tested of the outputs lies before and behind them.
    network.encoder.layers = network.encoder.layers[:2]
    return network


def on_meta(name: str = "ast", num_classes: int = 527) -> Ast:
    with torch.device("meta"):
        return Ast.from_name(name, num_classes, 128)


def log_mels(clips: int = 2, frames: int = 60, seed: int = 0) -> Tensor:
    return torch.randn(clips, 128, frames, generator=torch.Generator().manual_seed(seed)) * 15 - 30


# Counts


def test_ast_has_86594063_parameters_at_audiosets_527_classes() -> None:
    assert count_parameters(on_meta()) == 86_594_063


@pytest.mark.parametrize(
    "printed", [p for p in Ast.PRINTED if p.quantity == "parameters"], ids=lambda p: p.model
)
def test_with_the_originals_unused_imagenet_heads_the_papers_counts_come_out(printed) -> None:
    ours = count_parameters(on_meta(printed.model, printed.num_classes))
    assert printed.agrees(ours + IMAGENET_HEADS)
    assert not printed.agrees(ours)
    assert f"{IMAGENET_HEADS:,}" in printed.note


def test_each_class_costs_a_row_of_the_last_layer() -> None:
    assert count_parameters(on_meta(num_classes=50)) == 86_594_063 - (527 - 50) * (WIDTH + 1)


@pytest.mark.parametrize(("name", "across"), [("ast", 101), ("ast-512", 50)])
def test_multiply_adds_are_those_of_a_vision_transformer_over_overlapping_patches(
    name: str, across: int
) -> None:
    network = on_meta(name)
    patches = 12 * across
    tokens = patches + 2
    patching = patches * 16 * 16 * WIDTH
    products = tokens * (4 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN) + 2 * tokens * tokens * WIDTH
    norms = (2 * LAYERS + 2) * WIDTH
    assert multiply_adds(network, (128, 100)) == patching + LAYERS * products + norms + WIDTH * 527


# Features


def test_ten_seconds_fit_ast_and_five_fit_ast_512() -> None:
    assert on_meta("ast").input_shape(10) == (128, 1001)
    assert on_meta("ast-512").input_shape(5) == (128, 501)


def test_decibels_become_what_the_librarys_own_feature_extractor_makes_of_the_logarithm(model: Ast) -> None:
    decibels = log_mels()
    logarithms = (decibels / 10 * math.log(10)).mT
    padded = F.pad(logarithms, (0, 0, 0, 512 - 60))
    standardised = transformers.ASTFeatureExtractor().normalize(padded)
    with torch.no_grad():
        hidden = model.encoder(standardised).last_hidden_state
        expected = model.fc(model.head_norm((hidden[:, 0] + hidden[:, 1]) / 2))
        assert torch.allclose(model(decibels), expected, atol=1e-5)


def test_its_log_mel_is_kaldis_but_for_the_emphasis_of_high_frequencies() -> None:
    from torchaudio.compliance import kaldi

    noise = 0.1 * torch.randn(1, 32000, generator=torch.Generator().manual_seed(0))
    theirs = kaldi.fbank(noise, htk_compat=True, sample_frequency=16000, use_energy=False,
                         window_type="hanning", num_mel_bins=128, dither=0.0).T  # fmt: skip
    ours = LogMel(**Ast.features)(noise)[0] * math.log(10) / 10
    apart = ours.mean(1) - theirs.mean(1)
    # Filters at the HTK scale's places, at which |1 - 0.97 exp(-i w)|^2 is the emphasis.
    mels = torch.linspace(1127 * math.log(1 + 20 / 700), 1127 * math.log(1 + 8000 / 700), 130)[1:-1]
    angle = 2 * math.pi * 700 * ((mels / 1127).exp() - 1) / 16000
    emphasis = (1 + 0.97**2 - 2 * 0.97 * angle.cos()).log()
    assert apart[8:].abs().mean() > 1
    assert (apart + emphasis)[8:].abs().mean() < 0.5


# Length


def test_frames_behind_a_clips_length_are_not_heard(model: Ast) -> None:
    batch, lengths = log_mels(), torch.tensor([60, 25])
    with torch.no_grad():
        together = model(batch, lengths)
        alone = [model(clip[None, :, :n])[0] for clip, n in zip(batch, lengths.tolist(), strict=True)]
        assert torch.allclose(together, torch.stack(alone), atol=1e-5)
        assert not torch.allclose(together, model(batch), atol=1e-3)


def test_more_frames_than_it_has_positions_for_are_an_error(model: Ast) -> None:
    with pytest.raises(ModelError, match=r"\(1, 128, 513\): allowed is .* 1 to 512 frames"):
        model(torch.zeros(1, 128, 513))


@pytest.mark.parametrize("shape", [(128, 20), (2, 64, 20), (2, 128, 0), (2, 1, 128, 20)])
def test_wrong_input_is_told_what_is_allowed(model: Ast, shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match=r"allowed is floating point of shape \[batch, 128, frames\]"):
        model(torch.zeros(shape))


# Building


def test_other_bins_are_told_that_128_is_allowed() -> None:
    with pytest.raises(ModelError, match="in_bins is 64: allowed is 128"):
        Ast.from_name("ast", 10, 64)


@pytest.mark.parametrize("name", ["ast-1024", "ast-", "astronomy"])
def test_a_wrong_name_is_told_the_right_ones(name: str) -> None:
    with pytest.raises(ModelError, match=r"allowed is ast .* or ast-512"):
        Ast.from_name(name, 10, 128)


def test_without_transformers_it_names_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ModelError, match=r"pip install 'clipmill\[ast\]'"):
        on_meta()


def test_the_head_is_what_depends_on_the_classes() -> None:
    shapes = [{k: v.shape for k, v in on_meta("ast", n).state_dict().items()} for n in (5, 7)]
    differing = {name for name, shape in shapes[0].items() if shapes[1][name] != shape}
    assert {name.partition(".")[0] for name in differing} == {"fc"} <= set(Ast.HEAD)


# Training and inference


def test_every_parameter_gets_a_gradient_and_the_two_tokens_different_ones(model: Ast) -> None:
    trained = copy.deepcopy(model).train()
    trained(log_mels(1)).square().sum().backward()
    assert [
        name for name, p in trained.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ] == []
    embeddings = trained.encoder.embeddings
    assert not torch.allclose(embeddings.cls_token.grad, embeddings.distillation_token.grad)


def test_bfloat16_logits_are_float32_by_autocast_and_by_weights(model: Ast) -> None:
    with torch.no_grad():
        exact = model(log_mels())
        with torch.autocast("cpu", torch.bfloat16):
            by_autocast = model(log_mels())
        by_weights = copy.deepcopy(model).to(torch.bfloat16)(log_mels())
    for logits in (by_autocast, by_weights):
        assert logits.dtype == torch.float32
        assert torch.allclose(logits, exact, atol=0.1)


def test_compiles_without_graph_breaks_and_answers_the_same(model: Ast) -> None:
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(log_mels()), model(log_mels()), atol=1e-5)
