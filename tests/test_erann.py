"""ERANN: the papers' counts to the digit, the architecture written out a second time, and what it must bear."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clipmill_models import Erann, ModelError, count_parameters, create_model, multiply_adds, outline_model
from clipmill_models.erann import AudioResidualBlock

PREPRINT_TABLE_4 = {
    "erann-8x4-4": 24_504_849,
    "erann-8x4-5": 38_198_545,
    "erann-8x1-6": 54_435_473,
    "erann-8x2-6": 54_532_241,
    "erann-8x4-6": 54_919_313,
    "erann-8x8-6": 56_467_601,
}
JOURNAL = {
    "erann-0-6": 54_435_473,
    "erann-1-6": 54_532_241,
    "erann-2-6": 54_919_313,
    "erann-2-5": 38_198_545,
}


def on_meta(name: str, num_classes: int = 527, in_bins: int = 128) -> nn.Module:
    return outline_model(name, num_classes=num_classes, in_bins=in_bins)


def small(name: str = "erann-1-1", num_classes: int = 5, in_bins: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return create_model(name, num_classes=num_classes, in_bins=in_bins)


# Counts


@pytest.mark.parametrize(("name", "parameters"), PREPRINT_TABLE_4.items())
def test_the_preprints_six_parameter_counts_to_the_digit(name: str, parameters: int) -> None:
    assert count_parameters(on_meta(name)) == parameters


@pytest.mark.parametrize(("name", "parameters"), JOURNAL.items())
def test_the_journals_four_parameter_counts_to_the_digit(name: str, parameters: int) -> None:
    assert count_parameters(on_meta(name)) == parameters


def test_erann_1_6_has_the_papers_54532241_parameters_off_the_meta_device_too() -> None:
    assert count_parameters(create_model("erann-1-6", num_classes=527, in_bins=128)) == 54_532_241


def papers_count(s_m: int, width: int, classes: int, bins: int) -> int:
    """Parameters by the journal's Tables 1 and 2 and Eq. 3 and 5, added up by hand."""
    total, before = 2 * bins, 1
    for stage in range(5):
        channels = 8 * width * 2**stage
        x, y = (1, 1) if stage == 0 else (2, 4 if stage <= s_m else 2)
        k1, k2 = {1: 3, 2: 3, 4: 6}, {1: 3, 2: 3, 4: 5}
        total += k1[x] * k1[y] * before * channels + k2[x] * k2[y] * channels**2 + before * channels
        total += (
            2 * before + 2 * channels + 2 * channels
        )  # the three BatchNorms of the block that changes the size
        total += 3 * (2 * 9 * channels**2 + 2 * 2 * channels)
        before = channels
    return total + before**2 + before + before * classes + classes


@given(st.integers(0, 4), st.integers(1, 12), st.integers(1, 1000), st.integers(1, 256))
@settings(max_examples=30, deadline=None)
def test_the_count_is_the_papers_at_any_width_number_of_classes_and_bins(
    s_m: int, width: int, classes: int, bins: int
) -> None:
    model = on_meta(f"erann-8x{2**s_m}-{width}", classes, bins)
    assert count_parameters(model) == papers_count(s_m, width, classes, bins)


def test_counting_leaves_the_model_as_it_was() -> None:
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    multiply_adds(model, (32, 64))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


# Names


def test_both_naming_schemes_build_the_same_network() -> None:
    for s_m in range(4):
        journal, preprint = on_meta(f"erann-{s_m}-2"), on_meta(f"erann-8x{2**s_m}-2")
        shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (journal, preprint)]
        assert shapes[0] == shapes[1]
        assert [m.stride for m in journal.modules() if isinstance(m, nn.Conv2d)] == [
            m.stride for m in preprint.modules() if isinstance(m, nn.Conv2d)
        ]


def test_t_m_16_strides_by_4_in_the_last_stage_too() -> None:
    assert [on_meta(f"erann-8x{t_m}-1").time_stride for t_m in (1, 2, 4, 8, 16)] == [16, 32, 64, 128, 256]
    assert on_meta("erann-8x16-1").stages[4][0].conv1.kernel_size == (3, 6)


def test_names_are_case_insensitive_and_the_model_keeps_the_canonical_one() -> None:
    assert on_meta(" ERANN-8X2-6").name == "erann-8x2-6"


def test_a_model_says_what_it_takes() -> None:
    assert Erann.input == on_meta("erann-0-1").input == "features"


@pytest.mark.parametrize(
    "name",
    [
        "erann-4-6",
        "erann-1-0",
        "erann-1--1",
        "erann-1",
        "erann-8x3-6",
        "erann-0x2-6",
        "erann-1-6-2",
        "erann-1-10000",
        "erann-1-1\u0663",
    ],
)
def test_a_wrong_erann_is_told_both_schemes(name: str) -> None:
    with pytest.raises(ModelError, match=r"erann-\{s_m\}-\{W\} with s_m 0, 1, 2 or 3.*t_m 1, 2, 4, 8 or 16"):
        create_model(name, num_classes=10)


@pytest.mark.parametrize("bad", [{"num_classes": 0}, {"num_classes": 2.5}, {"in_bins": 0}, {"in_bins": True}])
def test_wrong_sizes_are_told_what_is_allowed(bad: dict[str, int]) -> None:
    with pytest.raises(ModelError, match=f"{next(iter(bad))} is .* allowed is any whole number from 1 up"):
        create_model("erann-1-1", **{"num_classes": 10, **bad})


@pytest.mark.parametrize("shape", [(2, 32), (2, 1, 32, 128), (2, 31, 128), (2, 32, 0)])
def test_wrong_input_is_told_what_is_allowed(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ModelError, match=r"floating point of shape \[batch, 32, frames\] with at least 1 frame"
    ):
        small()(torch.zeros(shape))


# The network


def batch_norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    w = {key: weights[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")}
    return F.batch_norm(x, w["running_mean"], w["running_var"], w["weight"], w["bias"])


def papers_forward(x: Tensor, weights: dict[str, Tensor], s_m: int) -> Tensor:
    """Tables 1 and 2 and Equations 3 and 5 of the journal paper, read once more and written plainly."""
    x = batch_norm(x, weights, "norm")[:, None]
    for stage in range(5):
        for block in range(4):
            at = f"stages.{stage}.{block}"
            y_stride = 1 if stage == 0 or block > 0 else (4 if stage <= s_m else 2)
            stride = (1 if stage == 0 or block > 0 else 2, y_stride)
            padding = (1, 2 if y_stride == 4 else 1)
            y = batch_norm(x, weights, f"{at}.norm1")
            if (stage, block) != (0, 0):
                y = F.leaky_relu(y, 0.01)
            y = F.conv2d(y, weights[f"{at}.conv1.weight"], None, stride, 1)
            y = F.leaky_relu(batch_norm(y, weights, f"{at}.norm2"), 0.01)
            y = F.conv2d(y, weights[f"{at}.conv2.weight"], None, 1, padding)
            if block == 0:
                x = F.conv2d(x, weights[f"{at}.shortcut.conv.weight"], None, stride)
                x = batch_norm(x, weights, f"{at}.shortcut.norm")
            x = x + y
    pooled = x.mean((2, 3)) + x.flatten(2).max(2).values
    hidden = F.leaky_relu(F.linear(pooled, weights["fc1.weight"], weights["fc1.bias"]), 0.01)
    return F.linear(hidden, weights["fc2.weight"], weights["fc2.bias"])


@pytest.mark.parametrize("s_m", range(4))
def test_forward_is_the_papers_tables_written_out(s_m: int) -> None:
    model = small(f"erann-{s_m}-1").eval()
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.ndim == 1:
            nn.init.uniform_(tensor, 0.5, 1.5)
    x = torch.randn(2, 32, 128)
    with torch.no_grad():
        assert torch.allclose(model(x), papers_forward(x, model.state_dict(), s_m), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["erann-0-1", "erann-3-1", "erann-8x16-1"])
@pytest.mark.parametrize("frames", [1, 127, 129, 300])
def test_any_number_of_frames_will_do(name: str, frames: int) -> None:
    logits = small(name).eval()(torch.randn(1, 32, frames))
    assert logits.shape == (1, 5)
    assert logits.isfinite().all()


@pytest.mark.parametrize("bins", [1, 20, 64])
def test_any_number_of_bins_will_do(bins: int) -> None:
    assert small(in_bins=bins).eval()(torch.randn(2, bins, 40)).shape == (2, 5)


def test_short_time_is_padded_with_the_mean_that_the_first_batch_norm_makes_zero() -> None:
    # In float64: logits of some hundreds are rounded otherwise by each kind of processor.
    model = small("erann-3-1").eval().double()
    x = torch.randn(1, 32, 100, dtype=torch.float64)
    mean = model.norm.running_mean.fill_(-40.0)[None, :, None].expand(1, 32, 28)
    assert torch.allclose(model(x), model(torch.cat([x, mean], 2)), atol=1e-4)


def test_every_parameter_gets_a_gradient_the_first_one_channel_norm_too() -> None:
    # DistributedDataParallel waits for the gradient of every registered parameter.
    model = small()
    model(torch.randn(2, 32, 64)).square().sum().backward()
    assert model.stages[0][0].norm1.num_features == 1
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_clips_do_not_see_each_other_when_evaluated() -> None:
    model, x = small().eval(), torch.randn(3, 32, 64)
    assert torch.allclose(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-3)


def test_channels_last_gives_the_same_gradients_at_the_narrowest_width() -> None:
    # A strided 1x1 convolution of under 16 channels crashes here, at this size, on some CPUs.
    x = torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(0))
    gradients = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = small("erann-0-1", in_bins=64).to(memory_format=memory_format)
        model(x).mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]).double())
    assert F.cosine_similarity(*gradients, dim=0) > 0.999


# Clips of several lengths


def settled(name: str, in_bins: int = 32) -> nn.Module:
    """In evaluation mode, with statistics and weights that no longer are a fresh network's."""
    model = small(name, in_bins=in_bins).eval()
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.ndim == 1:
            nn.init.uniform_(tensor, 0.5, 1.5)
    return model


@given(
    name=st.sampled_from(["erann-0-1", "erann-2-1", "erann-3-1", "erann-8x16-1"]),
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=4),
)
@settings(max_examples=12, deadline=None)
def test_a_padded_batch_with_lengths_gives_what_each_clip_gives_alone(name: str, lengths: list[int]) -> None:
    model = settled(name)
    clips = [torch.randn(32, n, generator=torch.Generator().manual_seed(n)) for n in lengths]
    batch = torch.stack([F.pad(clip, (0, 300 - clip.shape[1]), value=-7.0) for clip in clips])
    with torch.inference_mode():
        together = model(batch, torch.tensor(lengths))
        alone = torch.cat([model(clip[None]) for clip in clips])
    assert torch.allclose(together, alone, rtol=1e-4, atol=1e-3 * float(alone.abs().max()))


@pytest.mark.parametrize("behind", [float("nan"), float("-inf")])
def test_nothing_behind_a_clips_end_is_heard_be_it_no_number(behind: float) -> None:
    model, clip = settled("erann-1-1"), torch.randn(1, 32, 100)
    padded = F.pad(clip, (0, 60), value=behind)
    with torch.inference_mode():
        found = model(padded, torch.tensor([100]))
        assert torch.allclose(found, model(clip), rtol=1e-4, atol=1e-3 * float(found.abs().max()))


def test_without_lengths_the_padding_is_heard() -> None:
    model, clip = settled("erann-0-1"), torch.randn(1, 32, 128)
    with torch.inference_mode():
        assert not torch.allclose(model(F.pad(clip, (0, 128), value=-7.0)), model(clip), rtol=1e-2)


@pytest.mark.parametrize("lengths", [torch.tensor([5]), torch.tensor([[5, 5]]), torch.tensor([5.0, 5.0])])
def test_wrong_lengths_are_told_what_is_allowed(lengths: Tensor) -> None:
    with pytest.raises(ModelError, match=r"lengths are torch.* allowed is int64 of shape \(2,\)"):
        small()(torch.zeros(2, 32, 64), lengths)


@pytest.mark.parametrize("seconds", [1, 2.5, 10, 60])
def test_a_clip_of_1_to_60_seconds_will_do(seconds: float) -> None:
    with torch.inference_mode():
        assert settled("erann-1-1")(torch.randn(1, 32, round(seconds * 128))).isfinite().all()


# Precision and compilation


def test_bfloat16_autocast_trains_and_its_logits_are_float32() -> None:
    model, x = small(), torch.randn(4, 32, 64)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    assert logits.dtype == torch.float32
    logits.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_bfloat16_weights_answer_in_float32_and_close_to_the_full_ones() -> None:
    model, x = small().eval(), torch.randn(4, 32, 128)
    with torch.inference_mode():
        full = model(x)
        half = model.to(torch.bfloat16)(x)
    assert half.dtype == torch.float32
    assert F.cosine_similarity(half, full).min() > 0.99


@pytest.mark.parametrize("lengths", [None, torch.tensor([100, 41])])
def test_compiles_without_graph_breaks_and_answers_the_same(lengths: Tensor | None) -> None:
    model, x = small().eval(), torch.randn(2, 32, 100)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x, lengths), model(x, lengths), atol=1e-5)


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="the inductor needs a C++ compiler"
)
def test_a_block_compiled_to_machine_code_answers_and_learns_the_same() -> None:
    x, own = (
        torch.randn(2, 4, 8, 32),
        torch.arange(32)[None, None, None] < torch.tensor([32, 20])[:, None, None, None],
    )
    answers = []
    for compiled in (False, True):
        torch.manual_seed(0)
        block = AudioResidualBlock(4, 8, (2, 4))
        run = torch.compile(block, fullgraph=True) if compiled else block
        y = run(x, own, own[..., ::4])
        y.square().mean().backward()
        answers.append((y.detach(), torch.cat([p.grad.flatten() for p in block.parameters()])))
    (eager, eager_gradients), (compiled, compiled_gradients) = answers
    assert torch.allclose(compiled, eager, rtol=1e-4, atol=1e-4)
    assert torch.allclose(compiled_gradients, eager_gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [None, [96, 50]])
def test_on_a_gpu_compiled_in_bfloat16_it_answers_as_in_float32(lengths: list[int] | None) -> None:
    model = small("erann-1-1").cuda().to(memory_format=torch.channels_last).eval()
    x = torch.randn(2, 32, 96, device="cuda")
    own = None if lengths is None else torch.tensor(lengths, device="cuda")
    with torch.inference_mode():
        eager = model(x, own)
        with torch.autocast("cuda", torch.bfloat16):
            compiled = torch.compile(model, fullgraph=True)(x, own)
    assert F.cosine_similarity(compiled, eager).min() > 0.999


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [False, True])
def test_on_a_gpu_nothing_waits_for_the_device(lengths: bool) -> None:
    model = small("erann-1-1").cuda().to(memory_format=torch.channels_last)
    x = torch.randn(4, 32, 200, device="cuda")
    own = torch.tensor([200, 150, 100, 1], device="cuda") if lengths else None
    model(x, own)  # what is loaded at the first call may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            model(x, own).square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
