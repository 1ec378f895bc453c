"""EAT and GMME: counts to the digit, both written out a second time, and what they must bear."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clipmill_models import ModelError, count_parameters, multiply_adds
from clipmill_models.eat import Eat
from clipmill_models.gmme import Down, GatedMiniPatch

STRIDE = 256  # samples a token of the Speech Commands geometry, the smallest that there is


def on_meta(name: str, num_classes: int = 50) -> Eat:
    with torch.device("meta"):
        return Eat.from_name(name, num_classes, 0)


@cache
def settled(name: str = "eat-s-speech") -> Eat:
    """Of 5 classes, for evaluation, with BatchNorm's statistics of noise and nothing left at zero, so that every part tells."""
    torch.manual_seed(0)
    model = Eat.from_name(name, 5, 0)
    for tensor in model.parameters():
        if tensor.ndim < 2 or tensor is model.positions:
            nn.init.normal_(tensor, tensor.mean().item(), 0.1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    nn.init.normal_(model.project.weight, std=0.1)
    with torch.no_grad():
        model(torch.randn(4, 65 * STRIDE))
    return model.eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# Counts


@pytest.mark.parametrize(
    ("name", "classes", "parameters", "downsamplers"),
    [
        ("eat-s-esc50", 50, 5_183_618, 1_969_152),
        ("eat-s-us8k", 10, 5_175_386, 1_969_152),
        ("eat-s-speech", 35, 1_971_955, 493_056),
        ("eat-s", 527, 5_258_463, 1_969_152),
        ("eat-m", 527, 25_451_951, 7_870_464),
    ],
)
def test_the_counts_of_the_authors_code_to_the_digit(
    name: str, classes: int, parameters: int, downsamplers: int
) -> None:
    model = on_meta(name, classes)
    assert (count_parameters(model), model.downsampler_parameters()) == (parameters, downsamplers)


def test_a_class_takes_a_row_of_the_last_layer_and_a_token_a_position() -> None:
    assert count_parameters(on_meta("eat-s", 60)) - count_parameters(on_meta("eat-s", 50)) == 10 * 129
    assert count_parameters(on_meta("eat-s-esc50")) - count_parameters(on_meta("eat-s-us8k")) == 24 * 128


@pytest.mark.parametrize("preset", ["esc50", "speech"])
@pytest.mark.parametrize(
    ("k", "c", "both"), [(32, 8, 17_506), (32, 16, 35_010), (64, 16, 67_778), (6, 3, 1574)]
)
def test_gmmes_own_count_depends_on_k_and_c_alone(preset: str, k: int, c: int, both: int) -> None:
    assert both == 64 * k * c + 140 * c + 2
    assert on_meta(f"eat-s-gmme-{k}-{c}-{preset}").downsampler_parameters() == both


def test_gmme_replaces_the_last_two_downs_and_nothing_else() -> None:
    plain, gated = on_meta("eat-s-esc50"), on_meta("eat-s-gmme-32-8-esc50")
    assert count_parameters(gated) == count_parameters(plain) - 1_969_152 + 17_506
    names = [
        {name for name in model.state_dict() if not name.startswith("downs.")} for model in (plain, gated)
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize("model", sorted({printed.model for printed in Eat.PRINTED}))
def test_every_printed_figure_agrees_or_says_why_not(model: str) -> None:
    for printed in Eat.PRINTED:
        if printed.model == model:
            built = on_meta(model, printed.num_classes)
            downs = printed.quantity == "downsampler parameters"
            ours = built.downsampler_parameters() if downs else count_parameters(built)
            assert printed.agrees(ours) == (not printed.note), printed
            assert built.name in Eat.NAMES


def test_multiply_adds_are_those_of_every_convolution_product_and_norm() -> None:
    def res(channels: int, length: int) -> int:
        return length * channels * (2 * channels + 15) + 2 * channels

    def down(channels: int, length: int, factor: int) -> int:
        blur = length // factor * 2 * channels * (2 * factor + 1)
        return length * channels * 2 * channels * (factor + 1) + blur + 2 * channels

    samples = 64 * STRIDE
    total = samples * 16 * 7 + 16
    total += down(16, samples, 4) + res(32, samples // 4)
    total += down(32, samples // 4, 4) + down(64, samples // 16, 4) + res(128, samples // 64)
    total += 3 * res(128, 256) + down(128, 256, 2) + 3 * res(256, 128) + down(256, 128, 2)
    total += 64 * 512 * 128
    total += 4 * (65 * (4 * 128 * 128 + 2 * 128 * 512) + 2 * 65 * 65 * 128 + 2 * 128)
    total += 128 + 128 * 35
    assert multiply_adds(on_meta("eat-s-speech", 35), (samples,)) == total


# Names


def test_names_are_canonical_unique_and_buildable() -> None:
    assert len(set(Eat.NAMES)) == len(Eat.NAMES)
    assert [on_meta(name).name for name in Eat.NAMES] == list(Eat.NAMES)


def test_ten_seconds_are_the_default_and_left_out_of_the_name() -> None:
    assert on_meta("eat-s-10s").name == "eat-s"
    assert on_meta("eat-m-gmme-32-8-10s").name == "eat-m-gmme-32-8"
    assert on_meta("eat-s-10s").positions.shape == on_meta("eat-s").positions.shape == (1 + 216, 128)
    assert on_meta("eat-s-1s").positions.shape == (1 + 22, 128)


def test_a_model_says_what_it_takes() -> None:
    assert (on_meta("eat-s").input, on_meta("eat-s").sample_rate) == ("waveform", 22050)
    assert on_meta("eat-s-esc50").input_shape(5) == (110250,)
    assert on_meta("eat-s-gmme-4-2-speech").sample_rate == 16000
    assert on_meta("eat-s-speech").input_shape(1) == (16000,)


@pytest.mark.parametrize(
    "name",
    ["eat-l", "eat-", "eat-s-", "eat-s-0s", "eat-s-1000s", "eat-s-speech-esc50", "eat-s-gmme", "eat-s-gmme-32",
     "eat-s-gmme-10000-8", "eat-s-gmme-32-10000", "eat-s-gmme-31-8", "eat-s-gmme-0-8", "eat-s-gmme-32-0", "eat-s-gmme-32-8.5", "eat-s-esc50-gmme-32-8"],
)  # fmt: skip
def test_a_wrong_name_is_told_the_grammar(name: str) -> None:
    with pytest.raises(ModelError, match=rf"called '{name}': allowed is eat-.*K an even number.*esc50, us8k"):
        Eat.from_name(name, 10, 0)


def test_no_classes_are_told_what_is_allowed() -> None:
    with pytest.raises(ModelError, match="num_classes is 0: allowed is any whole number from 1 up"):
        Eat.from_name("eat-s", 0, 0)


@pytest.mark.parametrize("shape", [(16000,), (2, 1, 16000), (2, 0)])
def test_wrong_input_is_told_what_is_allowed(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ModelError, match=r"allowed is floating point of shape \[batch, samples\] with at least 1 sample"
    ):
        on_meta("eat-s-speech")(torch.zeros(shape, device="meta"))


def test_samples_that_are_whole_numbers_are_refused_for_they_are_not_in_minus_1_to_1() -> None:
    with pytest.raises(ModelError, match=r"got torch.int16 of shape .* allowed is floating point"):
        on_meta("eat-s-speech")(torch.zeros(2, 9000, dtype=torch.int16, device="meta"))


@pytest.mark.parametrize("lengths", [torch.tensor([9]), torch.tensor([[9, 9]]), torch.tensor([9.0, 9.0])])
def test_wrong_lengths_are_told_what_is_allowed(lengths: Tensor) -> None:
    with pytest.raises(ModelError, match=r"lengths are torch.* allowed is int64 of shape \(2,\)"):
        settled()(noise(2, 9000), lengths)


# The network


def batch_norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    statistics = (w[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *statistics)


def activated(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return F.leaky_relu(batch_norm(x, w, name), 0.2)


def reflected(x: Tensor, weight: Tensor, dilation: int = 1, groups: int = 1) -> Tensor:
    reach = dilation * (weight.shape[2] // 2)
    return F.conv1d(F.pad(x, (reach, reach), "reflect"), weight, dilation=dilation, groups=groups)


def plain_res(x: Tensor, w: dict[str, Tensor], at: str, dilation: int) -> Tensor:
    shortcut = F.conv1d(x, w[f"{at}.shortcut.weight"], w[f"{at}.shortcut.bias"])
    channels = activated(F.conv1d(x, w[f"{at}.channels.0.weight"]), w, f"{at}.channels.1")
    time = reflected(x, w[f"{at}.time.0.weight"], dilation, groups=x.shape[1])
    return shortcut + channels + activated(time, w, f"{at}.time.1")


def plain_down(x: Tensor, w: dict[str, Tensor], at: str, factor: int) -> Tensor:
    x = activated(reflected(x, w[f"{at}.conv.weight"]), w, f"{at}.norm")
    triangle = torch.tensor([min(i, 2 * factor + 2 - i) for i in range(1, 2 * factor + 2)]).to(x)
    blurred = reflected(x.flatten(0, 1)[:, None], (triangle / triangle.sum())[None, None])
    return blurred.view_as(x)[:, :, ::factor]


def plain_gmme(x: Tensor, w: dict[str, Tensor], at: str) -> Tensor:
    """Equations 1 to 5 of the paper, K taken from the weights."""

    def branch(name: str) -> Tensor:
        weight = w[f"{at}.{name}.0.weight"]
        rows, columns = weight.shape[2:]
        sides = (columns // 2 - 1, columns // 2 - 1 + x.shape[2] % 2, rows // 2 - 1, rows // 2 - 1)
        y = batch_norm(F.conv2d(F.pad(x[:, None], sides), weight, stride=2), w, f"{at}.{name}.1")
        return torch.where(y > 0, y, y * w[f"{at}.{name}.2.weight"][:, None, None])

    z_f, z_t, z_g = branch("frequency"), branch("time"), branch("overall")
    half = z_g.shape[1]
    gate = z_t[:, :half].sigmoid() * z_f[:, :half].sigmoid()
    product = z_t[:, half:] * z_f[:, half:]
    feature = torch.where(product > 0, product, product * w[f"{at}.act.weight"])
    mixed = torch.einsum("oc,bcft->boft", w[f"{at}.mix.weight"][:, :, 0, 0], z_g + gate * feature)
    return mixed.reshape(x.shape[0], 2 * x.shape[1], -1)


def plain_tokens(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    """The Speech Commands geometry as the authors' code orders it: `[B, samples] -> [B, tokens, 128]`."""
    x = activated(reflected(x[:, None], w["stem.0.weight"]), w, "stem.1")
    x = plain_res(plain_down(x, w, "blocks.0", 4), w, "blocks.1", 1)
    x = plain_down(plain_down(x, w, "blocks.2", 4), w, "blocks.3", 4)
    x = plain_res(x, w, "blocks.4", 1)
    for part in range(2):
        for index, dilation in enumerate((1, 3, 9)):
            x = plain_res(x, w, f"mixers.{part}.{index}", dilation)
        gated = f"downs.{part}.mix.weight" in w
        x = plain_gmme(x, w, f"downs.{part}") if gated else plain_down(x, w, f"downs.{part}", 2)
    return F.conv1d(x, w["project.weight"], w["project.bias"]).transpose(1, 2)


def plain_logits(tokens: Tensor, w: dict[str, Tensor]) -> Tensor:
    """Torch's own transformer, over the class token and `tokens` with the positions stretched over them."""
    layer = nn.TransformerEncoderLayer(128, 8, 512, 0.1, "gelu", batch_first=True)
    encoder = nn.TransformerEncoder(layer, 4, nn.LayerNorm(128), enable_nested_tensor=False).eval()
    theirs = {"qkv.": "self_attn.in_proj_", "out.": "self_attn.out_proj.", "linear": "linear", "norm": "norm"}
    state = {}
    for key in w:
        number, _, rest = key.removeprefix("layers.").partition(".")
        for ours, name in theirs.items():
            if key.startswith("layers.") and rest.startswith(ours):
                state[f"layers.{number}.{rest.replace(ours, name, 1)}"] = w[key]
    encoder.load_state_dict({**state, "norm.weight": w["norm.weight"], "norm.bias": w["norm.bias"]})
    stretched = F.interpolate(w["positions"][1:].T[None], tokens.shape[1], mode="linear")[0].T
    first = (w["cls_token"][0] + w["positions"][0]).expand(len(tokens), 1, -1)
    read = encoder(torch.cat([first, tokens + stretched], 1))[:, 0]
    return F.linear(read, w["fc.weight"], w["fc.bias"])


@pytest.mark.parametrize(
    ("name", "samples"),
    [
        ("eat-s-speech", 64 * STRIDE),
        ("eat-s-speech", 16000),
        ("eat-s-speech", 2 * 16000 + 1),
        ("eat-s-gmme-8-2-speech", 64 * STRIDE),
        ("eat-s-gmme-32-1-speech", 63 * STRIDE - 200),
    ],
)
def test_forward_is_the_authors_code_and_gmmes_equations_written_out(name: str, samples: int) -> None:
    model, x = settled(name), noise(2, samples)
    with torch.no_grad():
        logits = model(x)
        plain = plain_logits(plain_tokens(x, model.state_dict()), model.state_dict())
    assert (logits[0] - logits[1]).abs().max() > 0.01
    assert torch.allclose(logits, plain, rtol=1e-3, atol=1e-4)


def test_the_blur_is_a_fixed_triangle_that_is_saved_but_not_trained() -> None:
    down = Down(3, 4)
    assert torch.allclose(down.blur[5, 0] * 25, torch.tensor([1.0, 2, 3, 4, 5, 4, 3, 2, 1]))
    assert "blur" in down.state_dict()
    assert "blur" not in dict(down.named_parameters())


@settings(max_examples=25, deadline=None)
@given(st.integers(5, 40), st.integers(1, 6), st.integers(1, 10), st.sampled_from([2, 4]))
def test_downsamplers_double_the_channels_and_round_time_up(
    frames: int, half: int, kernel: int, factor: int
) -> None:
    x = torch.zeros(2, 2 * half, frames)
    assert Down(2 * half, factor)(x).shape == (2, 4 * half, -(-frames // factor))
    assert GatedMiniPatch(2 * kernel, 1)(x).shape == (2, 4 * half, (frames + 1) // 2)


# Lengths


def test_positions_are_as_learned_where_the_tokens_are_as_many() -> None:
    model = settled()
    assert torch.equal(model._positions(64, 64), model.positions[1:])
    assert torch.equal(model._positions(70, torch.tensor([[64]]))[0, :64], model.positions[1:])


@pytest.mark.parametrize("name", ["eat-s-speech", "eat-s-gmme-8-2-speech"])
@pytest.mark.parametrize("samples", [1, 255, 3000, 8065, 8066])
def test_a_clip_however_short_is_read_as_itself_before_silence(name: str, samples: int) -> None:
    model, x = settled(name), noise(2, samples)
    silenced = F.pad(x, (0, max(8065 - samples, 0)))
    with torch.no_grad():
        assert torch.allclose(model(x), model(silenced, torch.tensor([samples] * 2)), atol=1e-5)


@pytest.mark.parametrize("name", ["eat-s", "eat-m", "eat-s-gmme-32-8-5s", "eat-s-speech"])
def test_lengths_from_one_to_sixty_seconds_will_do(name: str) -> None:
    model = on_meta(name)
    for seconds in (1, 1.4, 7.3, 60):
        assert model(torch.empty(2, *model.input_shape(seconds), device="meta")).shape == (2, 50)


def test_with_lengths_a_clip_is_read_as_its_own_tokens_alone() -> None:
    model, x = settled(), noise(3, 20000)
    w, lengths = model.state_dict(), torch.tensor([20000, 12345, 256])
    silenced = x * (torch.arange(20000) < lengths[:, None])
    with torch.no_grad():
        logits, tokens = model(x, lengths), plain_tokens(silenced, w)
        for clip, own in enumerate((79, 49, 1)):
            alone = plain_logits(tokens[clip : clip + 1, :own], w)
            assert torch.allclose(logits[clip : clip + 1], alone, rtol=1e-3, atol=1e-4)


def test_what_lies_behind_a_clips_end_is_not_heard() -> None:
    model, x = settled(), noise(2, 16000)
    rubbish = x.clone()
    rubbish[1, 9000:] = torch.nan
    with torch.no_grad():
        heard = [model(wave, torch.tensor([16000, 9000])) for wave in (x, rubbish)]
    assert torch.equal(*heard)


def test_padding_reaches_no_further_back_than_the_docstring_says() -> None:
    model, x = settled(), noise(1, 3 * 16000)
    padded = F.pad(x, (0, 32000))
    with torch.no_grad():
        alone, batched = model._tokens(x)[0], model._tokens(padded)[0]
    differs = (alone - batched[: len(alone)]).abs().amax(1) > 1e-4
    sure = int((3 - 1.2) * 16000 / STRIDE)
    assert not differs[:sure].any()
    assert differs[-1]


def test_full_lengths_change_nothing_and_an_empty_clip_is_finite() -> None:
    model, x = settled(), noise(2, 16000)
    with torch.no_grad():
        assert torch.allclose(model(x, torch.tensor([16000, 16000])), model(x), atol=1e-5)
        assert model(x, torch.tensor([16000, 0])).isfinite().all()


# What it must bear


@pytest.mark.parametrize("name", ["eat-s-speech", "eat-s-gmme-8-2-speech"])
def test_every_parameter_gets_a_gradient(name: str) -> None:
    # In training, BatchNorm behind a constant shift leaves the shift no gradient but rounding.
    model = copy.deepcopy(settled(name))
    model(noise(2, 9000)).square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_fresh_weights_train_and_dropout_falls_silent_in_evaluation() -> None:
    torch.manual_seed(0)
    model, x = Eat.from_name("eat-s-gmme-4-1-speech", 5, 0), noise(2, 9000)
    assert not torch.equal(model(x), model(x))
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", ["eat-s-speech", "eat-s-gmme-8-2-speech"])
def test_bfloat16_is_near_and_under_autocast_the_logits_are_float32(name: str) -> None:
    model, x = settled(name), noise(4, 16000)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
            masked = model(x, torch.tensor([16000, 900, 0, 16000]))
        rounded = copy.deepcopy(model).to(torch.bfloat16)(x)
    assert logits.dtype == masked.dtype == torch.float32
    assert rounded.dtype == torch.float32
    for other in (logits, rounded):
        assert F.cosine_similarity(other - other.mean(0), exact - exact.mean(0)).min() > 0.9


def test_compiles_without_graph_breaks_and_answers_the_same() -> None:
    model, x, lengths = settled("eat-s-gmme-8-2-speech"), noise(2, 9000), torch.tensor([9000, 5000])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x, lengths), model(x, lengths), atol=1e-5)


def test_onnx_of_any_batch_and_length_answers_the_same() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = copy.deepcopy(settled("eat-s-gmme-8-2-speech"))
    # More of each kind take longer to export and show no more.
    model.layers, model.mixers[0], model.mixers[1] = (
        model.layers[:1],
        model.mixers[0][1:2],
        model.mixers[1][2:],
    )
    free = {"x": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    program = torch.onnx.export(
        model,
        (noise(2, 16001),),
        input_names=["x"],
        dynamo=True,
        dynamic_shapes=free,
        verbose=False,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options)
    for batch, samples in ((2, 16001), (1, 32000), (3, 700)):
        x = noise(batch, samples)
        with torch.no_grad():
            assert np.allclose(session.run(None, {"x": x.numpy()})[0], model(x).numpy(), atol=1e-4)
