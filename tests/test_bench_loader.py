"""The benchmark of the loader: that its figures reconcile with the index, and that it names what bounds it."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipmill import tables
from clipmill.cli.bench import command
from clipmill.errors import ConfigError, ShardError
from clipmill.loader import Feed
from clipmill.loader.ahead import AHEAD
from clipmill.loader.bench import LoaderSettings, bench_loader
from clipmill.loader.floors import BOUND, FAR_CLIPS, Floor, what_bounds

RATE = 8000
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def flac(make: Callable[..., dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("flac")
    make(out, sample_rate=RATE)
    return out


@pytest.fixture(scope="module")
def pcm16(make: Callable[..., dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pcm16")
    make(out, sample_rate=RATE, encoding="pcm16")
    return out


def bench(where: Path | str, *more: Path | str, clips: int = 12, **fields: Any) -> dict[str, Any]:
    """A report of batches of 4 in the order of the index: the clips timed are those from the fifth on."""
    feed = Feed(
        **{name: fields.pop(name) for name in ("workers", "access", "max_bad", "check") if name in fields}
    )
    fields = {"batch": 4, "clips": clips, "sampling": "sequential", **fields}
    return bench_loader(LoaderSettings((str(where), *map(str, more)), feed=feed, **fields), CPU)


def column(where: Path, name: str) -> np.ndarray:
    return tables.read_table(where / "index.parquet", tables.INDEX)[name].to_numpy()


# What it says


def test_the_command_says_how_fast_batches_come_and_what_bounds_them(run, flac):
    done = run("bench", "loader", flac, "--clips", 8, "--batch", 4, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert f"{flac}: 22 clips, opened in" in done.stderr
    said = done.stdout
    assert re.search(
        r"^8 clips in [\d.]+ s: shuffled, whole clips, batches of 4, 2 threads of \d+ cores?, cpu$",
        said,
        re.M,
    )
    for name in ("clips/s", "x real time", "read", "int16", "CPU ms per clip", "s to open", "s to first batch", "memory",
                 "decoding alone", "reading alone"):  # fmt: skip
        assert re.search(rf"^  {name} +\d", said, re.M), name
    assert re.search(r"^  bad clips +0$", said, re.M)
    assert re.search(
        r"^bound by (decoding|reading|the loader itself): [\d.]+ of what (decoding|reading) alone", said, re.M
    )


def test_json_holds_the_same_report(flac, capsys):
    words = [
        "loader",
        str(flac),
        "--clips",
        "5",
        "--batch",
        "4",
        "--crop-s",
        "0.5",
        "--sampling",
        "balanced",
        "--json",
    ]
    assert command.main([*words, "--workers", "0", "--device", "cpu"], standalone_mode=False) == 0
    report = json.loads(capsys.readouterr().out)
    asked = {"shards": [str(flac)], "clips_in_index": 22, "batch": 4, "crop_s": 0.5, "sampling": "balanced", "workers": 0,
             "access": "random", "check_hashes": False, "cache": None, "device": "cpu", "sample_rate": RATE,
             "encodings": ["flac"], "clips": 8, "bad_clips": 0, "bad_reasons": {}}  # fmt: skip
    assert {name: report[name] for name in asked} == asked
    assert report["bound_by"] in ("decode", "store", "loader")
    assert report["bound"].startswith("bound by ")
    assert report["bound_share"] == pytest.approx(
        report["clips_per_s"] / min(floor["clips_per_s"] for floor in report["floors"].values())
    )


# That its figures reconcile


def after_the_first(count: int, workers: int = 0) -> np.ndarray:
    """The rows of 22 that are counted: behind those that were ready when the clock was started."""
    first = 4 * (1 + (workers + AHEAD if workers else 0))
    return np.arange(first, first + count) % 22


@pytest.mark.parametrize("workers", [0, 2])
def test_rates_are_those_of_the_clips_after_the_first_batch(flac, workers):
    report = bench(flac, workers=workers)
    counted = after_the_first(12, workers)
    samples, lengths = (int(column(flac, name)[counted].sum()) for name in ("samples", "length"))
    seconds = report["seconds"]
    assert report["clips"] == 12
    assert report["clips_per_s"] * seconds == pytest.approx(12)
    assert report["times_real_time"] * seconds == pytest.approx(samples / RATE)
    assert report["delivered_mb_per_s"] * seconds == pytest.approx(2 * samples / 1e6)
    assert report["read_mb_per_s"] * seconds == pytest.approx(lengths / 1e6)
    assert report["cpu_ms_per_clip"] > 0
    assert report["peak_memory_bytes"] >= report["memory_bytes"] > abs(report["memory_growth_bytes"])
    assert min(report["open_s"], report["first_batch_s"]) > 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("clipmill-loader")]
    for floor in report["floors"].values():
        # Both did the same clips of the run, in the same order.
        assert floor["mb_per_s"] / floor["clips_per_s"] == pytest.approx(lengths / 12 / 1e6)


def test_of_raw_samples_the_crop_alone_is_read_unless_hashes_are_checked_and_none_are_decoded(pcm16):
    crop = bench(pcm16, crop_s=0.25)
    assert crop["read_mb_per_s"] == pytest.approx(crop["delivered_mb_per_s"])
    assert crop["read_mb_per_s"] * crop["seconds"] == pytest.approx(12 * 2 * 0.25 * RATE / 1e6)
    assert set(crop["floors"]) == {"store"}
    whole = bench(pcm16, crop_s=0.25, check=True)
    assert whole["read_mb_per_s"] * whole["seconds"] == pytest.approx(
        2 * column(pcm16, "samples")[after_the_first(12)].sum() / 1e6
    )
    assert set(whole["floors"]) == {"decode", "store"}


def test_several_sets_count_as_one_and_a_floor_counts_the_clips_of_all(flac, pcm16):
    report = bench(flac, pcm16, clips=40)
    assert report["clips_in_index"] == 44
    assert report["encodings"] == ["flac", "pcm16"]
    lengths = np.concatenate([column(flac, "length"), 2 * column(pcm16, "samples")])
    lengths = lengths[4:]
    assert report["read_mb_per_s"] * report["seconds"] == pytest.approx(lengths.sum() / 1e6)
    floor = report["floors"]["decode"]
    assert floor["mb_per_s"] / floor["clips_per_s"] == pytest.approx(lengths.mean() / 1e6)


def test_without_a_number_of_clips_batches_are_taken_for_some_seconds(pcm16):
    report = bench(pcm16, clips=0, seconds=0.2)
    assert report["seconds"] >= 0.2
    assert report["clips"] % 4 == 0
    assert report["clips_per_s"] * report["seconds"] == pytest.approx(report["clips"])


# Where clips come from


def test_what_the_hdf5_library_alone_can_read_is_one_floor_and_has_no_bytes_that_are_known(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("CLIPMILL_CACHE", str(tmp_path / "cache"))
    with h5py.File(tmp_path / "theirs.h5", "w") as file:
        file["audio_name"] = [f"clip {number}" for number in range(6)]
        waves = np.random.default_rng(0).integers(-3000, 3000, (6, RATE)).astype("<i2")
        file.create_dataset("waveform", data=waves, compression="gzip")
        file["target"] = np.eye(6, 3, dtype=bool)
        file.attrs["sample_rate"] = RATE
    report = bench(tmp_path / "theirs.h5")
    assert report["clips_in_index"] == 6
    assert report["read_mb_per_s"] is None
    assert list(report["floors"]) == ["store"]
    assert report["floors"]["store"]["mb_per_s"] is None
    assert report["times_real_time"] == pytest.approx(report["clips_per_s"])


class Counting(SimpleHTTPRequestHandler):
    """Serves stretches of files, and writes down of which."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        self.asked.append(path.suffix)
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        data = path.read_bytes()
        part = data[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *args: Any) -> None:
        pass


def test_far_shards_are_read_again_for_a_few_clips_alone(flac, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPMILL_CACHE", str(tmp_path / "cache"))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Counting, directory=str(flac))) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        report = bench(f"http://127.0.0.1:{server.server_port}", clips=FAR_CLIPS + 40)
        server.shutdown()
    assert report["clips"] == FAR_CLIPS + 40
    assert set(report["floors"]) == {"decode", "store"}
    assert Counting.asked.count(".tar") == 4 + FAR_CLIPS + 40 + FAR_CLIPS


def test_a_stream_is_measured_as_it_comes_and_its_floor_is_whole_tars(flac):
    report = bench(flac, access="stream", sampling="shuffled", workers=2)
    assert (report["access"], report["clips"]) == ("stream", 12)
    assert report["clips_per_s"] * report["seconds"] == pytest.approx(12)
    tars = [path.stat().st_size for path in flac.glob("*.tar")]
    floor = report["floors"]["store"]
    # Between what the smallest tar has for each of its clips, and the largest.
    assert min(tars) / 5 <= 1e6 * floor["mb_per_s"] / floor["clips_per_s"] <= max(tars)
    assert report["bound_by"] in ("decode", "store", "loader")


def test_a_clip_that_cannot_be_read_is_counted_with_its_reason(make, tmp_path):
    make(tmp_path, sample_rate=RATE)
    index = tables.read_table(tmp_path / "index.parquet", tables.INDEX).to_pylist()
    for damaged in (index[8], index[6]):
        with open(tmp_path / damaged["shard"], "r+b") as file:
            file.seek(damaged["offset"] + damaged["length"] // 2)
            file.write(bytes(64))
    report = bench(tmp_path, clips=40, max_bad=0.1)
    assert (report["bad_clips"], report["bad_reasons"]) == (2, {"corrupt": 2})
    with pytest.raises(ShardError, match=f"clip {damaged['key']} cannot be read"):
        bench(tmp_path, clips=40)


def test_what_a_stream_cannot_do_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(
        ConfigError, match="--crop-s 1: a stream's clips come whole; allowed is 0, or --access random"
    ):
        bench(tmp_path / "nowhere", access="stream", crop_s=1.0)


# What bounds it


def floors(**rates: float) -> dict[str, Floor]:
    return {name: Floor(rate, None, 1.0) for name, rate in rates.items()}


@pytest.mark.parametrize(
    ("rate", "rates", "by", "words"),
    [
        (93, {"decode": 100, "store": 900}, "decode",
         "bound by decoding: 0.93 of what decoding alone reaches in 2 threads, 100.0 clips/s"),
        (50, {"decode": 500, "store": 55}, "store",
         "bound by reading: 0.91 of what reading alone reaches in 2 threads, 55.0 clips/s"),
        (95, {"decode": 200, "store": 900, "device": 100}, "device",
         "bound by copying to the device: 0.95 of what copying to the device alone reaches, 100.0 clips/s"),
        (60, {"decode": 100, "store": 150}, "decode",
         "bound by decoding: 0.60 of what decoding alone reaches in 2 threads, 100.0 clips/s, and 1.00 of reading and "
         "decoding in turn"),
        (55, {"decode": 100, "store": 900}, "loader",
         "bound by the loader itself: 0.55 of what decoding alone reaches in 2 threads, 100.0 clips/s, the slowest floor"),
    ],
)  # fmt: skip
def test_the_bound_is_the_slowest_floor_where_the_loader_comes_near_it(rate, rates, by, words):
    bound = what_bounds(rate, floors(**rates), 2, in_turn=True)
    assert (bound.by, bound.words) == (by, words)


def test_a_stream_reads_and_decodes_at_once_so_each_floor_bounds_it_alone():
    assert what_bounds(60, floors(decode=100, store=150), 2, in_turn=False).by == "loader"


@given(
    rate=st.floats(1, 1e5),
    rates=st.dictionaries(st.sampled_from(["decode", "store", "device"]), st.floats(1, 1e5), min_size=1),
    in_turn=st.booleans(),
)
def test_whatever_bounds_it_its_share_is_of_the_slowest_floor(rate, rates, in_turn):
    bound = what_bounds(rate, floors(**rates), 1, in_turn=in_turn)
    slowest = min(rates.values())
    assert bound.share == rate / slowest
    if bound.share >= BOUND:
        assert rates[bound.by] == slowest
    if bound.by != "loader":
        assert bound.share >= BOUND / 2


@pytest.mark.gpu
def test_on_cuda_copying_is_a_floor_too(flac):
    settings = LoaderSettings((str(flac),), batch=4, clips=12, seconds=0.5, feed=Feed(workers=2))
    report = bench_loader(settings, torch.device("cuda"))
    assert set(report["floors"]) == {"decode", "store", "device"}
    assert report["floors"]["device"]["mb_per_s"] > 0
