"""Exported runs: what the files answer, at any length, what they say of themselves, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open

from clipmill.errors import ConfigError, TrainError
from clipmill.features import FrontEnd
from clipmill.train.checkpoint import Run, read_run
from clipmill.train.export import LOGIT_TOLERANCE, PROBABILITY_TOLERANCE, Exported, export_run
from clipmill.train.loop import train
from clipmill.train.trace import RealFrontEnd, program_of, trace_run
from clipmill.train.transfer import read_weights
from conftest import REPO, SHALLOW
from test_train import CLASSES, CPU, RATE, TINY, plan_of, same_state, shards_of

pytestmark = pytest.mark.usefixtures("shallow")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps."""
    root = tmp_path_factory.mktemp("export")
    train(plan_of(shards_of(root / "easy", 12), TINY, fold=1), root / "run")
    return root / "run"


@pytest.fixture(scope="module")
def trained(folder: Path) -> Run:
    return read_run(folder, CPU)


@pytest.fixture(scope="module")
def told(folder: Path) -> subprocess.CompletedProcess:
    """What the command says when it exports ONNX with the front end inside."""
    code = f"{SHALLOW}; from clipmill.cli import main; main()"
    command = [sys.executable, "-c", code, "export", str(folder), "--format", "onnx"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)


@pytest.fixture(scope="module")
def inside(folder: Path, told: subprocess.CompletedProcess) -> Path:
    assert told.returncode == 0, told.stderr
    return folder / "model.onnx"


@pytest.fixture(scope="module")
def outside(trained: Run, folder: Path) -> Exported:
    return export_run(trained, "onnx", folder / "outside.onnx", frontend="outside", opset=20)


@pytest.fixture(scope="module")
def program(trained: Run) -> Exported:
    return export_run(trained, "torch")


@pytest.fixture(scope="module")
def loaded(program: Exported) -> tuple[Any, dict[str, Any]]:
    """The .pt2 as torch alone reads it: what can be called, and its description."""
    files = {"clipmill.json": ""}
    tagger = torch.export.load(program.file, extra_files=files).module()
    return tagger, json.loads(files["clipmill.json"])


@pytest.fixture(scope="module")
def weights(trained: Run) -> Exported:
    return export_run(trained, "safetensors")


def sound(seconds: float, batch: int = 2, rate: int = RATE, seed: int = 0) -> torch.Tensor:
    return 0.2 * torch.randn(batch, round(seconds * rate), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def eager(run: Run, wave: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = run.model(run.features(wave))
    return logits, logits.softmax(1)


def by_onnx(path: Path) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    assert [output.name for output in session.get_outputs()] == ["logits", "probabilities"]
    return lambda x: [torch.from_numpy(out) for out in session.run(None, {taken.name: x.numpy()})]


def assert_same(theirs: Any, ours: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.testing.assert_close(theirs[0], ours[0], rtol=LOGIT_TOLERANCE, atol=LOGIT_TOLERANCE)
    torch.testing.assert_close(theirs[1], ours[1], rtol=0, atol=PROBABILITY_TOLERANCE)
    assert theirs[0].shape == theirs[1].shape == ours[0].shape


# What the files answer


@pytest.mark.parametrize("seconds", [1, 2, 10, 60])
def test_onnx_with_the_front_end_inside_answers_as_the_run_at_any_length(trained, inside, seconds):
    wave = sound(seconds, 1)
    assert_same(by_onnx(inside)(wave), eager(trained, wave))


@pytest.mark.parametrize(("seconds", "batch"), [(0.01, 1), (0.3, 3), (1.37, 2), (2.5, 5)])
def test_onnx_pads_what_is_no_whole_second_as_training_does(trained, inside, seconds, batch):
    wave = sound(seconds, batch)
    assert_same(by_onnx(inside)(wave), eager(trained, wave))


@pytest.mark.parametrize(("seconds", "batch"), [(1, 1), (2, 3), (10, 1)])
def test_onnx_with_the_front_end_outside_takes_features_of_any_length(trained, outside, seconds, batch):
    wave = sound(seconds, batch)
    assert_same(by_onnx(outside.file)(trained.features(wave)), eager(trained, wave))


@pytest.mark.parametrize("frames", [1, 15, 100, 129])
def test_onnx_pads_features_to_the_networks_stride_as_the_network_does(trained, outside, frames):
    features = trained.features(sound(2))[..., :frames].contiguous()
    with torch.inference_mode():
        logits = trained.model(features)
    assert_same(by_onnx(outside.file)(features), (logits, logits.softmax(1)))


@pytest.mark.parametrize(("seconds", "batch"), [(0.3, 3), (1, 1), (2, 3), (10, 1), (60, 1)])
def test_torchs_program_answers_as_the_run_at_any_length(trained, loaded, seconds, batch):
    wave = sound(seconds, batch)
    with torch.inference_mode():
        assert_same(loaded[0](wave), eager(trained, wave))


def test_torchs_program_with_the_front_end_outside_takes_features(trained):
    traced = trace_run(trained, inside=False)
    assert (traced.input, traced.input_shape) == ("features", ("batch", 128, "frames"))
    for seconds, batch in ((1, 1), (10, 3)):
        wave = sound(seconds, batch)
        with torch.inference_mode():
            assert_same(traced.program.module()(trained.features(wave)), eager(trained, wave))


def test_what_was_compared_is_said_and_lies_within_the_tolerance(outside, program, weights):
    for made in (outside, program, weights):
        assert made.compared_s == (1.0, 2.5)
        assert made.compared_batches == (1, 3)
        assert 0 <= made.probability_difference <= PROBABILITY_TOLERANCE
        assert 0 <= made.logit_difference <= LOGIT_TOLERANCE
        assert made.bytes == made.file.stat().st_size > 1e5
    assert weights.logit_difference == 0.0


@pytest.mark.parametrize(
    ("rate", "resample_to", "settings"),
    [
        (44100, None, {}),
        (44100, 32000, {"n_fft": 1024, "win_length": 1024, "hop": 320, "n_mels": 64}),
        (44100, 22050, None),
        (16000, 22050, None),
        (8000, None, {"n_fft": 512, "win_length": 400, "hop": 160, "mel_scale": "htk", "mel_norm": None, "n_mels": 40}),
    ],
)  # fmt: skip
def test_the_front_end_that_is_exported_gives_the_numbers_of_the_one_trained_with(
    rate, resample_to, settings
):
    feature = None if settings is None else {"name": "logmel", "settings": settings}
    ours = FrontEnd(rate, resample_to, feature)
    theirs = RealFrontEnd(ours)
    for seconds in (0.01, 0.3, 1, 2.503):
        wave = sound(seconds, rate=rate)
        torch.testing.assert_close(
            theirs(wave), ours(wave), rtol=0, atol=2e-2 if feature is not None else 1e-6
        )


@pytest.mark.parametrize(
    ("rate", "resample_to"), [(44100, None), (44100, 22050), (44100, 32000), (44100, 40960), (48000, 32000)]
)
def test_no_length_of_sound_is_special_to_the_front_end_that_is_exported(rate, resample_to):
    ours = FrontEnd(rate, resample_to, None if resample_to else {"name": "logmel"})
    theirs = program_of(RealFrontEnd(ours), torch.zeros(2, 102180), (0, 1)).module()
    for samples in (440, 441, 881, rate - 1, rate, rate + 1, 6 * rate, 10 * rate + 7, 440999):
        wave = sound(samples / rate, 1, rate)
        torch.testing.assert_close(theirs(wave), ours(wave), rtol=0, atol=1e-6 if resample_to else 2e-2)


def test_sound_that_is_padded_to_so_many_seconds_is_so_in_what_is_exported():
    ours = FrontEnd(16000, 22050, least_s=1.5)
    theirs = program_of(RealFrontEnd(ours), torch.zeros(2, 30000), (0, 1)).module()
    for samples in (100, 23999, 24000, 24001, 40000):
        wave = sound(samples / 16000, 1, 16000)
        torch.testing.assert_close(theirs(wave), ours(wave), rtol=0, atol=1e-6)


# What is in the files


def test_there_is_nothing_complex_in_the_graph_and_nothing_beyond_onnx_itself(inside, outside):
    complex_types = {onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128}
    for path in (inside, outside.file):
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        operators = {node.op_type for node in model.graph.node}
        assert {"Conv", "Softmax"} <= operators
        assert operators.isdisjoint({"STFT", "DFT", "If", "Loop", "Scan"})
        assert {node.domain for node in model.graph.node} == {""}
        values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
        assert not complex_types & {value.type.tensor_type.elem_type for value in values}
        assert not complex_types & {tensor.data_type for tensor in model.graph.initializer}


def test_inputs_are_float32_with_batch_and_length_left_open(inside, outside):
    for path, name, shape in (
        (inside, "waveform", ["batch", "samples"]),
        (outside.file, "features", ["batch", 128, "frames"]),
    ):
        (taken,) = onnxruntime.InferenceSession(str(path)).get_inputs()
        assert (taken.name, taken.type, taken.shape) == (name, "tensor(float)", shape)


def test_the_opset_is_18_or_the_one_that_was_asked_for(inside, outside):
    assert [(o.domain, o.version) for o in onnx.load(inside).opset_import] == [("", 18)]
    assert [(o.domain, o.version) for o in onnx.load(outside.file).opset_import] == [("", 20)]
    assert outside.opset == 20


def about(path: Path) -> dict[str, Any]:
    """What a file says of itself, read with nothing of ours."""
    if path.suffix == ".onnx":
        texts = onnxruntime.InferenceSession(str(path)).get_modelmeta().custom_metadata_map
    else:
        with safe_open(path, "pt") as file:
            texts = file.metadata()
    return {name: json.loads(text) for name, text in texts.items()}


def test_every_file_says_all_that_is_needed_to_use_it(trained, inside, outside, loaded, weights):
    for said in (about(inside), about(outside.file), loaded[1], about(weights.file)):
        assert said["labels"] == list(CLASSES)
        assert (said["model"], said["in_bins"], said["loss"]) == ("erann-3-1", 128, "softmax")
        assert FrontEnd(**said["features"]).config == trained.features.config
        assert (said["frames_per_s"], said["weights"]) == (128, "best")
    assert (about(inside)["frontend"], about(inside)["sample_rate"]) == ("inside", RATE)
    assert loaded[1]["input_shape"] == ["batch", "samples"]
    assert about(outside.file)["input_shape"] == ["batch", 128, "frames"]
    assert "frontend" not in about(weights.file)


def test_no_file_tells_where_it_was_made(inside, outside, program, weights):
    for path in (inside, outside.file, program.file, weights.file):
        content = path.read_bytes()
        assert str(REPO).encode() not in content
        assert str(path.parent).encode() not in content


def test_exported_weights_start_another_run_as_the_run_itself_does(folder, weights):
    state, origin = read_weights(weights.file)
    assert same_state(state, read_weights(folder)[0])
    assert (origin["labels"], origin["loss"]) == (list(CLASSES), "softmax")


def test_the_last_weights_are_exported_when_asked_for(folder, tmp_path):
    last = export_run(read_run(folder, CPU, "last"), "safetensors", tmp_path / "last.safetensors")
    assert about(last.file)["weights"] == "last"
    ema = torch.load(folder / "last.pt", weights_only=True)["ema"]
    assert same_state(read_weights(last.file)[0], dict(ema))


def test_the_documents_snippets_run_as_they_are_written_without_clipmill(folder, inside, program, weights):
    page = (REPO / "docs" / "export.md").read_text()
    *snippets, library = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(snippets) == 4
    together = [snippets[0], snippets[1], snippets[2] + snippets[3]]
    code = f"import sys; sys.modules['clipmill'] = None; {SHALLOW}\n" + "\n".join(together)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr
    by_onnx, by_program, by_weights = done.stdout.split()
    assert {by_onnx, by_program} <= set(CLASSES)
    assert by_onnx == by_weights
    compile(library, "docs/export.md", "exec")


# What is refused


def test_flags_that_cannot_be_say_what_is_allowed(trained, tmp_path):
    for format, options, message in (
        ("tflite", {}, r"--format tflite: allowed are onnx, safetensors, torch"),
        ("onnx", {"frontend": "beside"}, r"--frontend beside: allowed are inside and outside"),
        ("safetensors", {"frontend": "inside"}, r"--frontend inside: safetensors hold weights alone"),
        ("torch", {"opset": 20}, r"--opset 20: is ONNX's; leave it out with --format torch"),
        ("onnx", {"opset": 11}, r"--opset 11: allowed is 18 to \d+"),
        ("onnx", {"out": tmp_path / "x.pt2"}, r"--out .*x\.pt2: with --format onnx the name ends in \.onnx"),
        ("safetensors", {"out": trained.folder / "best.safetensors", "overwrite": True}, r"is a file of the run"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            export_run(trained, format, **options)


def test_onnx_without_its_libraries_says_how_to_install_them(trained, tmp_path, monkeypatch):
    for library in ("onnxruntime", "onnxscript"):
        monkeypatch.setitem(sys.modules, library, None)  # as Python notes that there is none
    with pytest.raises(TrainError, match=r"needs onnxscript, onnxruntime: pip install 'clipmill\[export\]'"):
        export_run(trained, "onnx", tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_replaced_only_when_asked_for(trained, tmp_path):
    out = tmp_path / "new" / "x.safetensors"
    export_run(trained, "safetensors", out)
    out.write_bytes(b"mine")
    with pytest.raises(TrainError, match=r"x\.safetensors: is there already; --overwrite replaces it"):
        export_run(trained, "safetensors", out)
    assert out.read_bytes() == b"mine"
    export_run(trained, "safetensors", out, overwrite=True)
    assert len(out.read_bytes()) > 1e6


def test_a_file_that_answers_otherwise_than_the_run_is_not_kept(trained, tmp_path):
    other = read_run(trained.folder, CPU)
    other.model.register_forward_hook(lambda model, inputs, logits: logits.flip(1))  # which no weights hold
    with pytest.raises(
        TrainError, match=r"x\.safetensors: answers otherwise than the run, so it is not kept: .* is"
    ):
        export_run(other, "safetensors", tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_answer_with_nothing_finite_are_an_error(trained, tmp_path):
    broken = read_run(trained.folder, CPU)
    torch.nn.init.constant_(broken.model.fc2.bias, float("nan"))
    with pytest.raises(TrainError, match=r"its best weights answer with no finite numbers"):
        export_run(broken, "safetensors", tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


# As a user runs it


def test_the_command_prints_json(folder, tmp_path, here: Callable[..., Any]):
    out = tmp_path / "x.safetensors"
    done = here("export", folder, "--format", "safetensors", "--out", out, "--json", "--weights", "last")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert (row["file"], row["bytes"], row["weights"]) == (str(out), out.stat().st_size, "last")
    assert row["probability_difference"] == 0.0


def test_the_exporters_chatter_stays_off_the_terminal(inside, told):
    assert told.stderr == ""
    assert len(told.stdout.splitlines()) == 3
    assert f"{inside}: erann-3-1, best weights, onnx, opset 18, " in told.stdout
    assert "waveform [batch, samples] (sound at 16000 Hz) -> logits, probabilities [batch, 3]" in told.stdout
    assert "tried on random sound of 1, 2.5 s, 1 and 3 at a time" in told.stdout


def test_a_damaged_run_is_named_without_a_traceback(folder, tmp_path, here: Callable[..., Any]):
    shutil.copy(folder / "config.json", tmp_path / "config.json")
    (tmp_path / "best.safetensors").write_bytes((folder / "best.safetensors").read_bytes()[:5000])
    done = here("export", tmp_path, "--format", "torch")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.search(r"best\.safetensors: cannot be read", done.stderr)
    assert "Traceback" not in done.stderr
