"""Starting from weights trained before: what comes over, what is said of the rest, and what is never unpickled."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from clipmill.errors import TrainError
from clipmill.tables import sha256_of
from clipmill.train.loop import train
from clipmill.train.transfer import initialise, read_weights
from clipmill_models import ModelError, Tagger, create_model
from clipmill_models.transfer import Transferred, load_matching
from test_train import CLASSES, plan_of, same_state, shards_of

LABELS = list(CLASSES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps."""
    root = tmp_path_factory.mktemp("transfer")
    train(plan_of(shards_of(root / "easy", 12), fold=1), root / "run")
    return root / "run"


def network(classes: int = 3, name: str = "erann-3-1", seed: int = 1) -> Tagger:
    torch.manual_seed(seed)
    return create_model(name, classes, 128)


def copy_of(model: Tagger) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def head_of(model: Tagger) -> set[str]:
    return {name for name in model.state_dict() if name.startswith("fc2.")}


# Tensor by tensor


def test_all_but_the_last_layer_comes_over_into_a_network_of_other_classes():
    theirs, ours = network(3), network(7, seed=2)
    fresh = copy_of(ours)
    told = load_matching(ours, theirs.state_dict())
    for name, tensor in ours.state_dict().items():
        expected = fresh if name in head_of(ours) else theirs.state_dict()
        assert torch.equal(tensor, expected[name]), name
    assert set(told.fresh) == head_of(ours)
    assert set(told.matched) == set(fresh) - head_of(ours)
    assert told.mismatched == told.missing == told.unused == ()
    head = sum(ours.get_parameter(name).numel() for name in head_of(ours))
    assert told.parameters == sum(p.numel() for p in ours.parameters())
    assert told.parameters_matched == told.parameters - head


def test_the_last_layer_stays_fresh_though_it_fits_unless_it_is_to_be_kept():
    theirs, ours = network(3), network(3, seed=2)
    fresh = copy_of(ours)
    load_matching(ours, theirs.state_dict())
    assert torch.equal(ours.fc2.weight, fresh["fc2.weight"])
    told = load_matching(ours, theirs.state_dict(), keep_head=True)
    assert same_state(copy_of(ours), copy_of(theirs))
    assert told.parameters_matched == told.parameters
    assert told.fresh == ()


def test_batch_norms_statistics_come_over_too():
    theirs, ours = network(), network(seed=2)
    theirs.norm.running_mean.fill_(-37.0)
    load_matching(ours, theirs.state_dict())
    assert (ours.norm.running_mean == -37.0).all()


def test_other_shapes_missing_and_unused_tensors_are_reported_by_name():
    theirs, ours = copy_of(network()), network(seed=2)
    theirs["norm.weight"] = torch.ones(64)
    del theirs["fc1.bias"]
    theirs["spectrogram_extractor.stft.conv_real.weight"] = torch.ones(2)
    fresh = copy_of(ours)
    told = load_matching(ours, theirs)
    assert told.mismatched == (("norm.weight", (64,), (128,)),)
    assert told.missing == ("fc1.bias",)
    assert told.unused == ("spectrogram_extractor.stft.conv_real.weight",)
    assert torch.equal(ours.norm.weight, fresh["norm.weight"])
    assert torch.equal(ours.fc1.bias, fresh["fc1.bias"])
    assert told.lines() == [
        f"{len(told.matched)} tensors taken over, {told.parameters_matched:,} of {told.parameters:,} parameters "
        f"({told.parameters_matched / told.parameters:.1%})",
        "drawn anew, the last layers: fc2.weight, fc2.bias",
        "drawn anew, of another shape: norm.weight (theirs (64,), ours (128,))",
        "drawn anew, not among theirs: fc1.bias",
        "theirs that are not used: spectrogram_extractor.stft.conv_real.weight",
    ]


def test_lines_name_a_few_and_count_the_rest_and_leave_out_what_is_empty():
    told = Transferred(("a",), (), (), (), ("b", "c", "d", "e", "f"), 1, 4)
    assert told.lines() == [
        "1 tensors taken over, 1 of 4 parameters (25.0%)",
        "theirs that are not used: b, c, d and 2 more",
    ]


def test_weights_of_another_network_are_refused_with_names_or_shapes_of_both_sides():
    with pytest.raises(
        ModelError, match=r"^0 of .* parameters fit erann-3-1: theirs are called bn0\.weight, conv1; its own"
    ):
        load_matching(network(), {"bn0.weight": torch.ones(3), "conv1": torch.ones(3)})
    head_alone = {name: tensor for name, tensor in network().state_dict().items() if name.startswith("fc2.")}
    with pytest.raises(ModelError, match=r"^0 of"):
        load_matching(network(), head_alone, keep_head=True)
    wide = {
        name: tensor for name, tensor in network(name="erann-3-2").state_dict().items() if tensor.ndim > 1
    }
    with pytest.raises(
        ModelError, match=r"other shapes, stages\.0\.0\.conv1\.weight \(16, 1, 3, 3\) instead of"
    ):
        load_matching(network(), wide)
    with pytest.raises(ModelError, match=r"theirs are called \(there are none\)"):
        load_matching(network(), {})


def test_weights_of_which_next_to_nothing_fits_are_refused_though_something_does():
    # Two widths of ERANN share the BatchNorm over the bins: 258 parameters of millions.
    with pytest.raises(
        ModelError, match=r"^258 of [\d,]+ parameters fit erann-3-1: \d+ tensors have its names"
    ):
        load_matching(network(), network(name="erann-3-2").state_dict())


def test_the_network_next_of_kin_is_let_in_and_what_differs_is_told():
    told = load_matching(network(name="erann-0-1"), network(name="erann-1-1").state_dict())
    assert 0.9 < told.parameters_matched / told.parameters < 1
    assert all(name.startswith("stages.1.0.conv") for name, _, _ in told.mismatched)


def test_a_refused_load_leaves_the_network_as_it_was():
    ours = network()
    before = copy_of(ours)
    with pytest.raises(ModelError):
        load_matching(
            ours, {name: tensor[..., None] for name, tensor in network(seed=2).state_dict().items()}
        )
    assert same_state(copy_of(ours), before)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    dropped=st.sets(st.integers(0, 200), max_size=2),
    reshaped=st.sets(st.integers(0, 200), max_size=2),
    keep=st.booleans(),
)
def test_every_tensor_is_accounted_for_once(dropped, reshaped, keep):
    names = list(network().state_dict())
    theirs: dict[str, torch.Tensor] = {}
    for place, (name, tensor) in enumerate(network(seed=2).state_dict().items()):
        if place not in dropped or name == "fc1.weight":
            theirs[name] = tensor[None] if place in reshaped and name != "fc1.weight" else tensor
    told = load_matching(network(), theirs, keep_head=keep)
    counted = [*told.matched, *told.fresh, *(name for name, _, _ in told.mismatched), *told.missing]
    assert sorted(counted) == sorted(names)
    assert told.unused == ()


# From a source


def test_a_run_gives_its_best_weights_or_else_the_averaged_ones_of_its_last_step(folder, tmp_path):
    state, origin = read_weights(folder)
    assert origin["from"] == str(folder / "best.safetensors")
    assert (origin["sha256"], origin["bytes"]) == sha256_of(folder / "best.safetensors")
    assert (origin["labels"], origin["loss"]) == (LABELS, "softmax")
    for name in ("config.json", "last.pt"):
        shutil.copy(folder / name, tmp_path / name)
    last, origin = read_weights(tmp_path)
    assert (origin["from"], origin["weights"]) == (str(tmp_path / "last.pt"), "ema")
    saved = torch.load(folder / "last.pt", weights_only=True)
    assert same_state(last, dict(saved["ema"]))
    assert state.keys() == last.keys()


def test_a_run_of_the_same_classes_and_loss_keeps_the_head(folder):
    ours = network(seed=5)
    told, origin = initialise(ours, folder, LABELS, "softmax")
    assert same_state(copy_of(ours), read_weights(folder)[0])
    assert origin == {
        "from": str(folder / "best.safetensors"),
        "sha256": sha256_of(folder / "best.safetensors")[0],
        "bytes": (folder / "best.safetensors").stat().st_size,
        "weights": "all",
        "matched": len(told.matched),
        "parameters": told.parameters,
        "head": "kept",
    }
    json.dumps(origin)


@pytest.mark.parametrize(
    ("labels", "loss"), [(LABELS[::-1], "softmax"), (["a", "b", "c"], "softmax"), (LABELS, "sigmoid")]
)
def test_the_head_is_fresh_for_other_labels_another_order_or_another_loss(folder, labels, loss):
    ours = network(seed=5)
    before = copy_of(ours)
    told, origin = initialise(ours, folder, labels, loss)
    assert origin["head"] == "fresh"
    assert {"labels", "loss"}.isdisjoint(origin)
    assert torch.equal(ours.fc2.weight, before["fc2.weight"])
    assert set(told.fresh) == head_of(ours)


def test_more_classes_take_all_but_the_head(folder):
    told, origin = initialise(network(50), folder, [f"c{n}" for n in range(50)], "softmax")
    assert origin["matched"] == len(told.matched) == len(network().state_dict()) - 2


def test_weights_of_another_network_are_an_error_that_names_the_file(tmp_path):
    save_file({"bn0.weight": torch.ones(64)}, tmp_path / "cnn.safetensors")
    with pytest.raises(
        TrainError, match=r"cnn\.safetensors: 0 of .* parameters fit erann-3-1: theirs are called bn0"
    ):
        initialise(network(), tmp_path / "cnn.safetensors", LABELS, "softmax")


def test_weights_as_published_under_model_with_data_parallels_names_and_a_samplers_arrays_come_in(tmp_path):
    model = network()
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    state["module.logmel_extractor.melW"] = torch.ones(513, 64)
    sampler = {
        "indexes": np.arange(5),
        "names": np.array(["a", "b"]),
        "score": np.float64(0.4),
        "pointers": [1, 2],
    }
    torch.save({"iteration": 600000, "model": state, "sampler": sampler}, tmp_path / "Cnn14_mAP=0.431.pth")
    told, origin = initialise(
        network(7, seed=2), tmp_path / "Cnn14_mAP=0.431.pth", list("abcdefg"), "sigmoid"
    )
    assert told.unused == ("logmel_extractor.melW",)
    assert told.missing == told.mismatched == ()
    assert origin["weights"] == "model"


@pytest.mark.parametrize("key", [None, "model", "state_dict", "ema"])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_torch_files_hold_a_state_dict_or_one_under_a_key(tmp_path, key, suffix):
    state = {"a.weight": torch.ones(2), "a.bias": torch.zeros(2)}
    torch.save({key: state, "step": 7} if key else state, tmp_path / f"x{suffix}")
    found, origin = read_weights(tmp_path / f"x{suffix}")
    assert same_state(found, state)
    assert origin["weights"] == (key or "all")


def test_a_name_that_merely_begins_like_data_parallels_is_left_alone(tmp_path):
    save_file({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "x.safetensors")
    assert set(read_weights(tmp_path / "x.safetensors")[0]) == {"module.a", "b"}


class Malicious:
    """What a stranger's file may hold: a command that runs as soon as it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def test_what_a_stranger_pickled_is_never_run(tmp_path):
    mark = tmp_path / "run"
    torch.save({"model": {"a": torch.ones(1)}, "extra": Malicious(mark)}, tmp_path / "x.pt")
    with pytest.raises(
        TrainError, match=r"x\.pt: cannot be read as tensors alone \(.*system.*Nothing else is unpick"
    ):
        read_weights(tmp_path / "x.pt")
    assert not mark.exists()


def test_arrays_of_objects_are_not_run_either(tmp_path):
    mark = tmp_path / "run"
    array = np.array([Malicious(mark)], dtype=object)
    torch.save({"model": {"a": torch.ones(1)}, "sampler": array}, tmp_path / "x.pt")
    with pytest.raises(TrainError, match=r"cannot be read as tensors alone"):
        read_weights(tmp_path / "x.pt")
    assert not mark.exists()


def test_sources_that_cannot_be_say_what_was_found_and_what_is_allowed(folder, tmp_path):
    allowed = r"allowed is a run's folder, a \.safetensors file, or a torch file"
    with pytest.raises(TrainError, match=rf"gone: is not there; {allowed}"):
        read_weights(tmp_path / "gone")
    with pytest.raises(TrainError, match=rf"holds no config\.json, so it is no run; {allowed}"):
        read_weights(tmp_path)
    (tmp_path / "x.onnx").write_bytes(b"")
    with pytest.raises(TrainError, match=rf"x\.onnx: ends in '\.onnx'; {allowed}"):
        read_weights(tmp_path / "x.onnx")
    shutil.copy(folder / "config.json", tmp_path / "config.json")
    with pytest.raises(TrainError, match=r"holds neither best\.safetensors nor last\.pt"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.safetensors", b"junk", r"x\.safetensors: cannot be read as safetensors"),
        ("x.pt", b"junk", r"x\.pt: cannot be read as tensors alone"),
        ("x.pth", b"", r"x\.pth: cannot be read as tensors alone"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainError, match=message):
        read_weights(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], r"holds a list; allowed is a dict of tensors by name"),
        (
            {"lr": 1.0, "step": 2},
            r"holds no tensors by name, but lr, step; allowed is a state dict, or one under ema,",
        ),
        ({}, r"holds no tensors by name, but nothing"),
    ],
)
def test_torch_files_without_tensors_by_name_say_what_they_hold(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(TrainError, match=message):
        read_weights(tmp_path / "x.pt")


def test_half_precision_weights_come_in_as_the_networks_own_type():
    half = {name: t.half() if t.is_floating_point() else t for name, t in network().state_dict().items()}
    ours = network(seed=2)
    load_matching(ours, half)
    assert ours.fc1.weight.dtype == torch.float32
    assert torch.equal(ours.fc1.weight, half["fc1.weight"].float())
