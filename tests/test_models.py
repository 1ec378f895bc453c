"""Every figure that the papers print of a network's size, and what every network must bear."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
import torch
from torch import nn

from clipmill.features import FrontEnd
from clipmill_models import (
    FAMILIES,
    ModelError,
    Printed,
    Tagger,
    count_parameters,
    create_model,
    list_models,
    multiply_adds,
    outline_model,
)
from conftest import REPO

WITHOUT_LIBRARY = [] if __import__("importlib.util").util.find_spec("transformers") else ["ast", "ast-512"]
NAMES = [name for name in list_models() if name not in WITHOUT_LIBRARY]
PANNS = ("cnn14", "resnet38", "wavegram-logmel-cnn")
ONE_OF_EACH = sorted({name.partition("-")[0]: name for name in NAMES}.values())


# What the papers print


@pytest.fixture(scope="module")
def listed(run) -> dict[str, dict[str, Any]]:
    """What `pipeline models --json` prints, by name."""
    done = run("models", "--json")
    assert done.returncode == 0, done.stderr
    return {row["name"]: row for row in json.loads(done.stdout)}


@pytest.mark.parametrize("name", NAMES)
def test_every_printed_size_is_ours_or_says_why_not(name: str, listed) -> None:
    for each in listed[name]["printed"]:
        if not each["agrees"]:
            number, _, unit = each["figure"].replace(",", "").partition(" ")
            figure = float(number) * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}[unit]
            # PANNs counts two operations to a multiply-add, and the Fourier transform's.
            ours = each["ours"] * (2 if name in PANNS and each["quantity"] == "multiply-adds" else 1)
            assert each["note"], each
            assert math.isclose(ours, figure, rel_tol=0.06), each


def test_all_figures_of_the_papers_are_compared(listed) -> None:
    sizes = [p for family in FAMILIES.values() for p in family.PRINTED if not p.quantity.startswith("audios")]
    assert sum(len(row["printed"]) for row in listed.values()) == len(sizes) > 90


def test_every_printed_figure_is_of_a_network_that_is_listed() -> None:
    for family in FAMILIES.values():
        assert {printed.model for printed in family.PRINTED} <= set(family.NAMES)
        assert {printed.quantity for printed in family.PRINTED} <= {
            "parameters", "multiply-adds", "downsampler parameters", "audios/s, B=1", "audios/s, B=32",
        }  # fmt: skip


@pytest.mark.parametrize(("figure", "value", "agrees"), [
    ("54,532,241", 54_532_241, True), ("54,532,241", 54_532_240, False),
    ("54.5 M", 54_532_241, True), ("54.6 M", 54_532_241, False), ("17.4 K", 17_400, True),
    ("101.231 G", 101_231_400_000, True), ("1961.1 K", 1_961_100, True), ("108", 107.6, True),
])  # fmt: skip
def test_a_figure_agrees_with_what_rounds_to_it(figure: str, value: float, agrees: bool) -> None:
    assert Printed("x", figure, "parameters", "somewhere").agrees(value) is agrees


# Names


def test_names_are_unique_canonical_and_case_insensitive() -> None:
    names = list_models()
    assert len(set(names)) == len(names)
    assert [outline_model(f" {name.upper()}", 3).name for name in NAMES] == NAMES


def test_an_unknown_name_is_told_every_name_that_is_allowed() -> None:
    with pytest.raises(ModelError) as caught:
        create_model("resnet-50", 10)
    for family in FAMILIES.values():
        assert family.GRAMMAR in str(caught.value)


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("classes", [0, -1, 2.5, True, "10"])
def test_a_wrong_number_of_classes_is_told_what_is_allowed(name: str, classes: object) -> None:
    with pytest.raises(ModelError, match=r"num_classes is .* allowed is any whole number from 1 up"):
        create_model(name, classes)  # type: ignore[arg-type]


# What every network is


@pytest.mark.parametrize("name", NAMES)
def test_a_network_says_what_it_takes_and_its_front_end_gives_just_that(name: str) -> None:
    network = outline_model(name, 3)
    assert network.input in ("features", "waveform")
    assert set(network.HEAD) <= {name for name, _ in network.named_modules()}
    front_end = FrontEnd.of(network, 44100)
    for seconds in (1.0, 2.5):
        given = front_end(torch.zeros(1, round(44100 * seconds)))
        assert tuple(given.shape[1:]) == network.input_shape(seconds)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_head_depends_on_the_number_of_classes(name: str) -> None:
    few, many = ({n: p.shape for n, p in outline_model(name, c).state_dict().items()} for c in (3, 11))
    changed = {n for n in few if few[n] != many[n]}
    head = outline_model(name, 3).HEAD
    assert changed
    assert all(any(n == h or n.startswith(f"{h}.") for h in head) for n in changed)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_an_outline_has_the_shapes_of_the_network_and_none_of_its_memory(name: str) -> None:
    outline = outline_model(name, 3)
    assert all(tensor.is_meta for tensor in outline.parameters())
    assert count_parameters(outline) == sum(p.numel() for p in outline.parameters())


def test_multiply_adds_are_products_and_the_weights_of_normalisations_once() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 4 * 2, 7)
    )
    assert multiply_adds(model, (2, 9, 5)) == 2 * 3 * 9 * (4 * 2) + 3 + 3 * 4 * 2 * 7


def test_multiply_adds_see_every_token_and_attention() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    tokens = 5
    projections, feed_forward, attention = 4 * 8 * 8, 2 * 8 * 16, 2 * tokens * 8
    assert multiply_adds(layer, (tokens, 8)) == tokens * (projections + feed_forward + attention) + 2 * 8


# The command


def test_the_command_prints_every_network_with_what_is_printed_of_it(listed) -> None:
    assert list(listed) == list_models()
    assert listed["erann-1-6"]["parameters"] == 54_532_241
    assert f"{listed['erann-1-6']['multiply_adds'] / 1e9:.2f}" == "77.18"
    assert {
        "quantity": "parameters", "figure": "54.2 M", "ours": 54_165_428, "agrees": True, "num_classes": 50,
        "seconds": 10.0, "source": "journal, Table 6", "note": None,
    } in listed["erann-1-6"]["printed"]  # fmt: skip


def test_the_command_sizes_any_network_that_is_named(here) -> None:
    done = here("models", "erann-2-12", "ERANN-1-6")
    assert done.returncode == 0, done.stderr
    assert re.search(r"erann-2-12 +log-mel +218,812,433 +235.52 G", done.stdout)
    assert re.search(r"54.2 M +54.2 M +journal, Table 6; 50 classes", done.stdout)
    wrong = here("models", "erann-9-6")
    assert wrong.returncode == 2
    assert (
        "error: no model is called 'erann-9-6': allowed is erann-{s_m}-{W} with s_m 0, 1, 2 or 3"
        in wrong.stderr
    )


def test_the_table_in_the_docs_is_what_the_command_counts(listed) -> None:
    text = (REPO / "docs" / "models.md").read_text()
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| .*\| ([\d,]+) \| ([\d.]+|-) \|$", text, re.MULTILINE)
    # The preprint's names are other names of the journal's networks.
    assert [name for name, _, _ in rows] == [name for name in listed if not re.match(r"erann-\d+x", name)]
    for name, parameters, giga in rows:
        row = listed[name]
        if not row["lacking"]:
            assert f"{row['parameters']:,}" == parameters
            assert giga == ("-" if row["multiply_adds"] is None else f"{row['multiply_adds'] / 1e9:.2f}")


def test_a_network_needs_its_rate_and_shape_to_be_fed() -> None:
    class Odd(Tagger):
        input = "waveform"
        sample_rate = 8000

    assert Odd().input_shape(2.5) == (20000,)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_on_a_gpu_no_network_waits_for_the_device_and_bfloat16_answers_alike(name: str) -> None:
    model = create_model(name, 3).cuda().to(memory_format=torch.channels_last).eval()
    front_end = FrontEnd.of(model, 44100).cuda()
    sound = torch.randn(2, 44100, device="cuda") / 10
    with torch.inference_mode():
        full = model(front_end(sound))  # what is loaded at the first call may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.autocast("cuda", torch.bfloat16):
                half = model(front_end(sound))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert half.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(half, full).min() > 0.98
