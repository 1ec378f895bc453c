"""PANNs' networks: the printed counts, the forward passes written out a second time, and what they must bear."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clipmill_models import Erann, ModelError, Tagger, count_parameters, multiply_adds
from clipmill_models.logmel import RealLogMel
from clipmill_models.panns import BasicBlock, Cnn14, ResNet38, WavegramLogmelCnn
from clipmill_models.wavegram import Wavegram, WavegramErann, draw_weights, wavegram_frames

FAMILIES: dict[str, type[Tagger]] = {
    "cnn14": Cnn14, "resnet38": ResNet38, "wavegram-logmel-cnn": WavegramLogmelCnn,
}  # fmt: skip
COUNTS = {"cnn14": 80_753_615, "resnet38": 73_783_247, "wavegram-logmel-cnn": 81_065_487}
TENSORS = {"cnn14": 81, "resnet38": 243, "wavegram-logmel-cnn": 135}
CLASSES = 7


def on_meta(name: str, num_classes: int = 527, in_bins: int = 64) -> Tagger:
    with torch.device("meta"):
        return FAMILIES[name].from_name(name, num_classes, in_bins)


def scrambled(model: Tagger) -> Tagger:
    """The same with BatchNorms and biases of no particular value, as training leaves them."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.ndim == 1:
            shift = -0.5 if name.endswith(("bias", "mean")) else 0.5
            tensor.data.uniform_(shift, shift + 1, generator=generator)
    if isinstance(model, WavegramLogmelCnn):
        model.bn0.running_mean.fill_(-30.0)
        model.bn0.running_var.fill_(30.0)
    return model


def thin(name: str) -> Tagger:
    """The network with an eighth of its channels: all its code, in 5 MB instead of 300."""
    network = on_meta(name, CLASSES)
    for at, layer in list(network.named_modules()):
        parent, _, child = at.rpartition(".")
        if at.startswith(("pre_conv0", "pre_bn0", "pre_block1", "pre_block2", "pre_block3", "bn0")):
            # The Wavegram's 128 channels are cut into bins.
            narrow: nn.Module = layer.to_empty(device="cpu")
        elif isinstance(layer, nn.Conv2d):
            sizes = (n if n <= 4 else n // 8 for n in (layer.in_channels, layer.out_channels))
            narrow = nn.Conv2d(*sizes, layer.kernel_size, layer.stride, layer.padding, bias=False)
        elif isinstance(layer, nn.BatchNorm2d):
            narrow = nn.BatchNorm2d(layer.num_features // 8)
        elif isinstance(layer, nn.Linear):
            narrow = nn.Linear(256, CLASSES if layer.out_features == CLASSES else 256)
        else:
            continue
        setattr(network.get_submodule(parent), child, narrow)
    draw_weights(network.to_empty(device="cpu"))
    for tensor in network.parameters():
        # As drawn, means and ReLUs would let die away what the first layers hear; residual sums do not.
        tensor.data *= 2.5 if tensor.ndim > 2 and name != "resnet38" else 1
    return scrambled(network)


@pytest.fixture(params=list(FAMILIES))
def model(request: pytest.FixtureRequest) -> Tagger:
    torch.manual_seed(0)
    return thin(request.param)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def clips(model: Tagger, count: int = 2, frames: int = 33) -> Tensor:
    return noise(count, 64, frames) if model.input == "features" else 0.1 * noise(count, 320 * frames)


def assert_same(found: Tensor, expected: Tensor, within: float = 1e-4) -> None:
    """Equal within a share of the largest logit."""
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=within)


# Counts


@pytest.mark.parametrize("name", COUNTS)
def test_the_papers_parameter_counts_to_the_digit(name: str) -> None:
    assert count_parameters(on_meta(name)) == COUNTS[name]


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("classes", [1, 50])
def test_a_class_costs_2049_parameters(name: str, classes: int) -> None:
    assert count_parameters(on_meta(name, classes)) == COUNTS[name] - (527 - classes) * 2049


def test_a_bin_costs_two_parameters() -> None:
    assert count_parameters(on_meta("cnn14", in_bins=128)) == COUNTS["cnn14"] + 128


@pytest.mark.parametrize("name", COUNTS)
def test_every_printed_count_is_ours_or_says_why_not(name: str) -> None:
    printed = FAMILIES[name].PRINTED
    assert printed
    for figure in printed:
        network = on_meta(figure.model, figure.num_classes)
        is_parameters = figure.quantity == "parameters"
        value = (
            count_parameters(network) if is_parameters else multiply_adds(network, network.input_shape(10))
        )
        assert figure.agrees(value) == (figure.note == ""), figure


@pytest.mark.parametrize(("name", "giga"), [("cnn14", "42.220"), ("resnet38", "48.962"), ("wavegram-logmel-cnn", "53.510")])  # fmt: skip
def test_panns_printed_multi_adds_to_the_digit_when_counted_as_panns_counts(name: str, giga: str) -> None:
    # 513 bins of 1001 frames, by two convolutions with 1024 taps.
    counts = [2 * 2 * 1024 * 513 * 1001]

    def count(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            counts.append(2 * module.weight.numel() * out[0, 0].numel())
        elif isinstance(module, nn.Linear):
            counts.append(2 * module.weight.numel() + module.bias.numel())
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.ReLU)):
            counts.append(2 * out.numel())
        elif isinstance(module, nn.AvgPool2d):
            counts.append(4 * out.numel())

    network = on_meta(name).eval()
    for module in network.modules():
        module.register_forward_hook(count)
    network(torch.empty(1, *network.input_shape(10), device="meta"))
    assert f"{sum(counts) / 1e9:.3f}" == giga


def test_ten_seconds_are_a_thousand_and_one_frames() -> None:
    assert [on_meta(name).input_shape(10) for name in FAMILIES] == [(64, 1001), (64, 1001), (320_000,)]


# Names


PUBLISHED = {
    "cnn14": {
        "bn0.running_var": (64,), "conv_block1.conv1.weight": (64, 1, 3, 3), "conv_block1.bn2.num_batches_tracked": (),
        "conv_block6.conv2.weight": (2048, 2048, 3, 3), "fc1.weight": (2048, 2048), "fc_audioset.bias": (527,),
    },
    "resnet38": {
        "bn0.weight": (64,), "conv_block1.bn1.bias": (64,), "resnet.layer1.0.conv1.weight": (64, 64, 3, 3),
        "resnet.layer2.0.downsample.1.weight": (128, 64, 1, 1), "resnet.layer2.0.downsample.2.running_mean": (128,),
        "resnet.layer3.5.bn2.weight": (256,), "resnet.layer4.2.conv2.weight": (512, 512, 3, 3),
        "conv_block_after1.conv1.weight": (2048, 512, 3, 3), "fc_audioset.weight": (527, 2048),
    },
    "wavegram-logmel-cnn": {
        "pre_conv0.weight": (64, 1, 11), "pre_bn0.running_mean": (64,), "pre_block1.conv1.weight": (64, 64, 3),
        "pre_block2.conv2.weight": (128, 128, 3), "pre_block3.bn2.bias": (128,),
        "pre_block4.conv1.weight": (64, 4, 3, 3), "bn0.bias": (64,), "conv_block1.conv2.weight": (64, 64, 3, 3),
        "conv_block2.conv1.weight": (128, 128, 3, 3), "conv_block6.bn1.weight": (2048,), "fc1.bias": (2048,),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_tensors_are_named_and_shaped_as_in_the_published_checkpoints(name: str) -> None:
    shapes = {key: tuple(tensor.shape) for key, tensor in on_meta(name).state_dict().items()}
    assert {key: shapes.get(key) for key in PUBLISHED[name]} == PUBLISHED[name]
    assert len(shapes) == TENSORS[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_each_network_answers_to_its_one_name(name: str) -> None:
    family = FAMILIES[name]
    assert family.NAMES == (name,) == (on_meta(name).name,)
    with pytest.raises(ModelError, match=f"no model is called '{name}-2': allowed is {name}"):
        family.from_name(f"{name}-2", 10, 64)
    with pytest.raises(ModelError, match="num_classes is 0: allowed is any whole number from 1 up"):
        family.from_name(name, 0, 64)


# The networks, written plainly


def norm(x: Tensor, w: dict[str, Tensor], at: str) -> Tensor:
    mean, var, weight, bias = (w[f"{at}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, mean, var, weight, bias)


def two_convolutions(x: Tensor, w: dict[str, Tensor], at: str) -> Tensor:
    for i in (1, 2):
        x = norm(F.conv2d(x, w[f"{at}.conv{i}.weight"], padding=1), w, f"{at}.bn{i}").relu()
    return x


def normalised(logmel: Tensor, w: dict[str, Tensor]) -> Tensor:
    """`[B, bins, frames] -> [B, 1, frames, bins]`."""
    return norm(logmel, w, "bn0").transpose(1, 2).unsqueeze(1)


def head(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    x = x.mean(3)
    x = F.linear(x.max(2).values + x.mean(2), w["fc1.weight"], w["fc1.bias"]).relu()
    return F.linear(x, w["fc_audioset.weight"], w["fc_audioset.bias"])


def plain_cnn14(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    x = normalised(x, w)
    for block in range(1, 6):
        x = F.avg_pool2d(two_convolutions(x, w, f"conv_block{block}"), 2)
    return head(two_convolutions(x, w, "conv_block6"), w)


def plain_resnet38(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    x = F.avg_pool2d(two_convolutions(normalised(x, w), w, "conv_block1"), 2)
    for layer, blocks in enumerate((3, 4, 6, 3), 1):
        for block in range(blocks):
            at = f"resnet.layer{layer}.{block}"
            shortcut = y = F.avg_pool2d(x, 2) if layer > 1 and block == 0 else x
            if f"{at}.downsample.1.weight" in w:
                shortcut = norm(F.conv2d(y, w[f"{at}.downsample.1.weight"]), w, f"{at}.downsample.2")
            y = norm(F.conv2d(y, w[f"{at}.conv1.weight"], padding=1), w, f"{at}.bn1").relu()
            y = norm(F.conv2d(y, w[f"{at}.conv2.weight"], padding=1), w, f"{at}.bn2")
            x = (y + shortcut).relu()
    return head(two_convolutions(F.avg_pool2d(x, 2), w, "conv_block_after1"), w)


def plain_wavegram_logmel_cnn(wave: Tensor, w: dict[str, Tensor]) -> Tensor:
    a = norm(F.conv1d(wave[:, None], w["pre_conv0.weight"], stride=5, padding=5), w, "pre_bn0").relu()
    for block in (1, 2, 3):
        a = norm(
            F.conv1d(a, w[f"pre_block{block}.conv1.weight"], padding=1), w, f"pre_block{block}.bn1"
        ).relu()
        a = F.conv1d(a, w[f"pre_block{block}.conv2.weight"], padding=2, dilation=2)
        a = F.max_pool1d(norm(a, w, f"pre_block{block}.bn2").relu(), 4)
    a = a.reshape(len(a), 4, 32, -1).transpose(2, 3)
    a = F.avg_pool2d(two_convolutions(a, w, "pre_block4"), (2, 1))
    x = normalised(RealLogMel(**Cnn14.features)(wave), w)
    x = F.avg_pool2d(two_convolutions(x, w, "conv_block1"), 2)
    x = torch.cat([x[:, :, : a.shape[2]], a], 1)
    for block in range(2, 6):
        x = F.avg_pool2d(two_convolutions(x, w, f"conv_block{block}"), 2)
    return head(two_convolutions(x, w, "conv_block6"), w)


PLAIN = {"cnn14": plain_cnn14, "resnet38": plain_resnet38, "wavegram-logmel-cnn": plain_wavegram_logmel_cnn}


def test_resnet38_at_full_width_is_panns_written_out_and_its_fresh_blocks_begin_as_their_shortcuts() -> None:
    torch.manual_seed(0)
    network = ResNet38.from_name("resnet38", 527, 64).eval()
    assert count_parameters(network) == COUNTS["resnet38"]
    blocks = [module for module in network.modules() if isinstance(module, BasicBlock)]
    assert len(blocks) == 16
    assert not any(block.bn2.weight.any() for block in blocks)
    x = clips(scrambled(network), count=1)
    with torch.no_grad():
        assert_same(network(x), plain_resnet38(x, network.state_dict()))


@pytest.mark.parametrize("frames", [32, 69])
def test_forward_is_panns_written_out(model: Tagger, frames: int) -> None:
    x = clips(model, frames=frames)
    with torch.no_grad():
        expected = PLAIN[model.name](x, model.state_dict())
        assert_same(model.eval()(x), expected)


# Lengths


def test_a_padded_batch_gives_what_each_clip_gives_alone(model: Tagger) -> None:
    frames = [1, 40, 64, 67] if model.input == "features" else [100, 20_000, 20_481, 21_444]
    batch = clips(model, len(frames), 68)
    # In float64, so that what is heard from behind a clip's end is not taken for rounding.
    model.double().eval()
    with torch.no_grad():
        found = model(batch, torch.tensor(frames))
        alone = torch.cat([model(batch[i : i + 1, ..., :length]) for i, length in enumerate(frames)])
    assert_same(found, alone, within=3e-6)


def test_lengths_that_say_nothing_change_nothing(model: Tagger) -> None:
    batch = clips(model)
    with torch.no_grad():
        found = model.eval()(batch, torch.full((2,), batch.shape[-1]))
        assert_same(found, model(batch))


@pytest.mark.parametrize("seconds", [0.003, 0.31, 0.32, 1.0, 3.33])
@pytest.mark.parametrize("name", FAMILIES)
def test_any_length_will_do(name: str, seconds: float) -> None:
    network = on_meta(name, 5).eval()
    assert network(torch.empty(2, *network.input_shape(seconds), device="meta")).shape == (2, 5)


@pytest.mark.parametrize("bins", [32, 40, 128])
def test_any_bins_from_32_up_will_do(bins: int) -> None:
    for name in ("cnn14", "resnet38"):
        assert on_meta(name, 5, bins)(torch.empty(2, bins, 90, device="meta")).shape == (2, 5)


# Errors


@pytest.mark.parametrize("name", ["cnn14", "resnet38"])
def test_fewer_bins_are_told_what_is_allowed(name: str) -> None:
    with pytest.raises(ModelError, match=f"in_bins is 31: {name} allows any whole number from 32 up"):
        on_meta(name, in_bins=31)


def test_wrong_input_is_told_what_is_allowed() -> None:
    for shape in ((2, 63, 90), (2, 64, 0), (2, 1, 64, 90)):
        with pytest.raises(
            ModelError, match=r"floating point of shape \[batch, 64, frames\] with at least 1 frame"
        ):
            on_meta("cnn14")(torch.empty(shape, device="meta"))
    for wrong in (torch.empty(2, 0), torch.empty(9), torch.zeros(2, 9, dtype=torch.int16)):
        with pytest.raises(
            ModelError, match=r"floating point of shape \[batch, samples\] with at least 1 sample"
        ):
            on_meta("wavegram-logmel-cnn")(wrong.to("meta"))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("lengths", [[3], [1.0, 2.0]])
def test_wrong_lengths_are_told_what_is_allowed(name: str, lengths: list[Any]) -> None:
    network = on_meta(name)
    with pytest.raises(ModelError, match=r"allowed is int64 of shape \(2,\)"):
        network(torch.empty(2, *network.input_shape(1), device="meta"), torch.tensor(lengths))


# Training, types and compilers


def test_every_parameter_gets_a_gradient_in_bfloat16_autocast_too(model: Tagger) -> None:
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(clips(model))
    assert logits.dtype == torch.float32
    logits.square().sum().backward()
    lacking = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert lacking == []


class Dropouts(TorchFunctionMode):
    """Notes the share that every dropout within drops."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.dropout:
            self.seen.append(kwargs["p"])
        return func(*args, **(kwargs or {}))


def test_dropout_stands_where_panns_has_it(model: Tagger) -> None:
    with Dropouts() as dropouts, torch.no_grad():
        model.train()(clips(model))
    residual_blocks = [0.1] * 16 if model.name == "resnet38" else [0.2] * 3
    assert dropouts.seen == [0.2, *residual_blocks, 0.2, 0.2, 0.5]


def test_dropout_is_the_trainings_only(model: Tagger) -> None:
    x = clips(model)
    with torch.no_grad():
        assert not torch.equal(model.train()(x), model(x))
        assert torch.equal(model.eval()(x), model(x))


def test_compiles_without_graph_breaks_and_answers_the_same(model: Tagger) -> None:
    x, lengths = clips(model), torch.tensor([32, clips(model).shape[-1]])
    compiled = torch.compile(model.eval(), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same(compiled(x, lengths), model(x, lengths))


def test_channels_last_answers_the_same(model: Tagger) -> None:
    x = clips(model)
    with torch.no_grad():
        expected = model.eval()(x)
        found = model.to(memory_format=torch.channels_last)(x)
    assert_same(found, expected)


def test_exported_to_onnx_cnn14_takes_any_size() -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = thin("cnn14").eval()
    sizes = ({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC},)
    program = torch.onnx.export(
        model, (clips(model, 2, 70),), dynamo=True, dynamic_shapes=sizes, verbose=False
    )
    assert program is not None
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    for count, frames in ((1, 20), (3, 101)):
        x = clips(model, count, frames)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            assert_same(torch.from_numpy(found), model(x))


def test_turned_to_bfloat16_it_answers_nearly_the_same(model: Tagger) -> None:
    x = clips(model)
    with torch.no_grad():
        expected = model.eval()(x)
        found = model.to(torch.bfloat16)(x)
    assert found.dtype == torch.float32
    assert F.cosine_similarity(found - found.mean(), expected - expected.mean()).min() > 0.99


# Wavegram and ERANN


@settings(max_examples=30, deadline=None)
@given(samples=st.integers(316, 4000))
def test_a_wavegram_has_a_frame_for_every_320_samples(samples: int) -> None:
    with torch.device("meta"):
        shape = Wavegram()(torch.empty(1, samples)).shape
    assert shape == (1, 128, int(wavegram_frames(torch.tensor([samples]))))
    assert shape[2] in (samples // 320, (samples + 4) // 320)


def wavegram_erann(name: str = "wavegram-erann-0-1") -> WavegramErann:
    torch.manual_seed(0)
    return WavegramErann.from_name(name, CLASSES)


@settings(max_examples=5, deadline=None)
@given(lengths=st.lists(st.integers(1, 8000), min_size=2, max_size=4))
def test_wavegram_erann_gives_in_a_padded_batch_what_each_clip_gives_alone(lengths: list[int]) -> None:
    network = scrambled(wavegram_erann()).eval()
    batch = noise(len(lengths), 8000)
    with torch.no_grad():
        found = network(batch, torch.tensor(lengths))
        alone = torch.cat([network(batch[i : i + 1, :length]) for i, length in enumerate(lengths)])
    assert_same(found, alone)


def test_wavegram_erann_is_a_wavegram_before_an_erann_of_128_bins() -> None:
    network = wavegram_erann("wavegram-erann-8x4-1").eval()
    wave = noise(2, 9000)
    with torch.no_grad():
        assert torch.equal(network(wave), network.erann(network.wavegram(wave)))
    assert network.erann.in_bins == 128
    assert network.input_shape(10) == (409_600,)
    erann = Erann.from_name("erann-8x4-1", CLASSES, 128)
    assert count_parameters(network) == count_parameters(erann) + count_parameters(Wavegram())


def test_wavegram_eranns_head_is_its_last_layer() -> None:
    network = wavegram_erann()
    assert [network.get_submodule(layer).out_features for layer in network.HEAD] == [CLASSES]


def test_wavegram_erann_trains_all_of_itself_and_compiles() -> None:
    network, wave = wavegram_erann(), noise(2, 6400)
    logits = torch.compile(network, fullgraph=True, backend="eager")(wave, torch.tensor([3000, 6400]))
    logits.square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", ["wavegram-erann-4-6", "wavegram-cnn14", "erann"])
def test_a_wrong_wavegram_erann_is_told_what_is_allowed(name: str) -> None:
    with pytest.raises(
        ModelError, match=f"no model is called '{name}': allowed is wavegram- and after it erann-"
    ):
        WavegramErann.from_name(name, 10)
