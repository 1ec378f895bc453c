"""ERANN: the papers' counts to the digit, the architecture written out a second time, and what it must bear."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipmill_models import Erann, ModelError, count_parameters, create_model, list_models, multiply_adds

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
# Millions of parameters: Table 4 (527 classes), 6 (50), 8 (10) and 9 (8) of the journal paper.
JOURNAL_MILLIONS = {
    527: {"2-4": "24.5", "2-5": "38.2", "0-6": "54.4", "1-6": "54.5", "2-6": "54.9", "3-6": "56.5"},
    50: {"0-3": "13.5", "1-3": "13.6", "0-4": "24.0", "1-4": "24.1", "2-4": "24.3", "2-5": "37.9",
         "0-6": "54.1", "1-6": "54.2", "2-6": "54.6"},
    10: {"0-3": "13.5", "1-3": "13.5", "0-4": "24.0", "1-4": "24.1", "2-4": "24.2", "2-5": "37.9",
         "0-6": "54.0", "1-6": "54.1", "2-6": "54.5"},
    8: {"1-3": "13.5", "0-4": "24.0", "1-4": "24.1", "2-4": "24.2", "2-5": "37.9",
        "0-6": "54.0", "1-6": "54.1", "2-6": "54.5"},
}  # fmt: skip


def on_meta(name: str, num_classes: int = 527, in_bins: int = 128) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, num_classes=num_classes, in_bins=in_bins)


def small(name: str = "erann-1-1", num_classes: int = 5, in_bins: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return create_model(name, num_classes=num_classes, in_bins=in_bins)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # On tensors this small, threads cost more than they bring.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Counts


@pytest.mark.parametrize(("name", "parameters"), PREPRINT_TABLE_4.items())
def test_the_preprints_six_parameter_counts_to_the_digit(name: str, parameters: int) -> None:
    assert count_parameters(on_meta(name)) == parameters


@pytest.mark.parametrize(("name", "parameters"), JOURNAL.items())
def test_the_journals_four_parameter_counts_to_the_digit(name: str, parameters: int) -> None:
    assert count_parameters(on_meta(name)) == parameters


def test_erann_1_6_has_the_papers_54532241_parameters_off_the_meta_device_too() -> None:
    assert count_parameters(create_model("erann-1-6", num_classes=527, in_bins=128)) == 54_532_241


@pytest.mark.parametrize("classes", JOURNAL_MILLIONS)
def test_the_journals_tables_4_6_8_and_9_in_millions(classes: int) -> None:
    counts = {size: count_parameters(on_meta(f"erann-{size}", classes)) for size in JOURNAL_MILLIONS[classes]}
    assert {size: f"{count / 1e6:.1f}" for size, count in counts.items()} == JOURNAL_MILLIONS[classes]


def test_multiply_adds_of_the_slides_eight_second_clips_to_the_digit() -> None:
    printed = {"8x1-6": "101.231", "8x2-6": "61.745", "8x4-6": "47.137", "8x8-6": "42.399",
               "8x4-5": "32.743", "8x4-4": "20.964"}  # fmt: skip
    counts = {size: multiply_adds(on_meta(f"erann-{size}"), (128, 1024)) for size in printed}
    assert {size: f"{count / 1e9:.3f}" for size, count in counts.items()} == printed


@pytest.mark.parametrize(
    ("name", "printed"),
    [("erann-8x4-5", 40.93), ("erann-8x2-6", 77.18), ("erann-8x4-6", 58.92), ("erann-8x8-6", 52.99)],
)
def test_multiply_adds_of_the_preprints_ten_second_clips(name: str, printed: float) -> None:
    # 52.99 is 52.9987 cut off, the others are rounded: all four lie within one of the last printed digit.
    assert abs(multiply_adds(on_meta(name), (128, 1280)) / 1e9 - printed) < 0.01


def test_multiply_adds_are_conv_weights_times_positions_and_other_weights_once() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 4 * 2, 7)
    )
    assert multiply_adds(model, (2, 9, 5)) == 2 * 3 * 9 * (4 * 2) + 3 + 3 * 4 * 2 * 7


def test_counting_leaves_the_model_as_it_was() -> None:
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    multiply_adds(model, (32, 64))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_table_in_the_docs_is_true() -> None:
    text = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    rows = re.findall(r"\| `(erann-[0-3]-\d)` \|.*?\| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \|", text)
    assert len(rows) == 10
    for name, at_527, at_50, multiplies in rows:
        assert count_parameters(on_meta(name)) == int(at_527.replace(",", ""))
        assert count_parameters(on_meta(name, 50)) == int(at_50.replace(",", ""))
        assert f"{multiply_adds(on_meta(name), (128, 1280)) / 1e9:.2f}" == multiplies


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


def test_listed_names_are_canonical_unique_and_buildable() -> None:
    names = list_models()
    assert len(set(names)) == len(names)
    assert {*PREPRINT_TABLE_4, *JOURNAL} <= set(names)
    assert [on_meta(name).name for name in names] == names


def test_a_model_says_what_it_takes() -> None:
    assert Erann.input == on_meta("erann-0-1").input == "features"


@pytest.mark.parametrize(
    "name", ["erann-4-6", "erann-1-0", "erann-1--1", "erann-1", "erann-8x3-6", "erann-0x2-6", "erann-1-6-2"]
)
def test_a_wrong_erann_is_told_both_schemes(name: str) -> None:
    with pytest.raises(ModelError, match=r"erann-\{s_m\}-\{W\} with s_m 0, 1, 2 or 3.*t_m 1, 2, 4, 8 or 16"):
        create_model(name, num_classes=10)


@pytest.mark.parametrize("name", ["", "resnet-50", "1-6", None])
def test_an_unknown_family_is_told_what_is_allowed(name: str) -> None:
    with pytest.raises(ValueError, match=r"no model is called .*allowed is erann-"):
        create_model(name, num_classes=10)


@pytest.mark.parametrize("bad", [{"num_classes": 0}, {"num_classes": 2.5}, {"in_bins": 0}, {"in_bins": True}])
def test_wrong_sizes_are_told_what_is_allowed(bad: dict[str, int]) -> None:
    with pytest.raises(ModelError, match=f"{next(iter(bad))} is .* allowed is any whole number from 1 up"):
        create_model("erann-1-1", **{"num_classes": 10, **bad})


@pytest.mark.parametrize("shape", [(2, 32), (2, 1, 32, 128), (2, 31, 128), (2, 32, 0)])
def test_wrong_input_is_told_what_is_allowed(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match=r"allowed is \[batch, 32, frames\] with at least 1 frame"):
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
    model = small("erann-3-1").eval()
    x = torch.randn(1, 32, 100)
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


def test_bfloat16_autocast_trains_and_its_logits_are_float32() -> None:
    model, x = small(), torch.randn(4, 32, 64)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    assert logits.dtype == torch.float32
    logits.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_compiles_without_graph_breaks_and_answers_the_same() -> None:
    model, x = small().eval(), torch.randn(2, 32, 100)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x), model(x), atol=1e-5)
