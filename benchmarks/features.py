"""How fast features are computed, beside librosa (spafe for GFCC) on the same clips and the same cores.

    python benchmarks/features.py                                  synthetic clips; three minutes on one core
    python benchmarks/features.py ../shared/data/esc10/audio --threads 2
    python benchmarks/features.py FOLDER --device cuda --clips 256 --only logmel,cqt --json out.json

ours       a module of `clipmill.features` with its default settings, on a batch that lies on the device.
bare FFT   torch's own transforms of the frames that ours takes, and nothing else
reference  librosa on a CPU, clip after clip, with the same settings, in float32, as far as the dB that ours ends at:
           `melspectrogram` and `power_to_db`, `mfcc`, `chroma_stft`, `cqt` (with its default sparsity) and
           `amplitude_to_db`, `onset_strength` and `tempogram`; spafe's `gfcc` with its own filters.

The process keeps to --threads cores, and torch and the libraries that librosa calls to as many threads. librosa itself
has none: where it calls nothing that does, more cores help ours alone. Each round times one batch of ours and
--reference-clips clips of the reference, in turns; ratios are taken in each round, and their median is shown, with the
least and the most. x real time is seconds of sound in a second.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import librosa
import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from spafe.features.gfcc import gfcc
from spafe.utils.preprocessing import SlidingWindow
from threadpoolctl import threadpool_limits

from clipmill.features import FEATURES, Feature, Framing, create_feature
from clipmill.tables import write_json
from clipmill.train.device import pick_device
from clipmill.train.timing import device_name, time_in_turn

Wave = NDArray[np.float32]


def logmel(wave: Wave, rate: int, s: Any) -> Wave:
    bands = {"n_mels": s.n_mels, "fmin": s.f_min, "fmax": s.f_max, "pad_mode": "reflect"}
    return librosa.power_to_db(
        librosa.feature.melspectrogram(y=wave, sr=rate, n_fft=s.n_fft, hop_length=Framing(rate).hop, **bands),
        top_db=None,
    )


def mfcc(wave: Wave, rate: int, s: Any) -> Wave:
    return librosa.feature.mfcc(S=logmel(wave, rate, s), n_mfcc=s.n_mfcc)


def gfcc_of_spafe(wave: Wave, rate: int, s: Any) -> Wave:
    window = SlidingWindow((s.win_length + 0.5) / rate, (Framing(rate).hop + 0.5) / rate, "hanning")
    edges = {"low_freq": s.f_min, "high_freq": s.f_max}
    return gfcc(wave, rate, s.n_gfcc, False, window=window, nfilts=s.n_filters, nfft=s.n_fft, **edges)


def chroma(wave: Wave, rate: int, s: Any) -> Wave:
    framed = {"n_fft": s.n_fft, "hop_length": Framing(rate).hop, "pad_mode": "reflect"}
    return librosa.feature.chroma_stft(y=wave, sr=rate, tuning=0, n_chroma=s.n_chroma, **framed)


def cqt(wave: Wave, rate: int, s: Any) -> Wave:
    bins = {"fmin": s.f_min, "n_bins": s.n_bins, "bins_per_octave": s.bins_per_octave}
    magnitude = np.abs(librosa.cqt(wave, sr=rate, hop_length=Framing(rate).hop, tuning=0, **bins))
    return librosa.amplitude_to_db(magnitude, amin=s.floor, top_db=None)


def tempogram(wave: Wave, rate: int, s: Any) -> Wave:
    bands = {"n_mels": s.n_mels, "fmin": s.f_min, "fmax": s.f_max, "pad_mode": "reflect"}
    hop = Framing(rate).hop
    onsets = librosa.onset.onset_strength(y=wave, sr=rate, n_fft=s.n_fft, hop_length=hop, **bands)
    return librosa.feature.tempogram(
        onset_envelope=onsets, sr=rate, hop_length=hop, win_length=s.window_frames
    )


REFERENCES: dict[str, Callable[[Wave, int, Any], Wave]] = {
    "logmel": logmel, "mfcc": mfcc, "gfcc": gfcc_of_spafe, "chroma": chroma, "cqt": cqt, "tempogram": tempogram,
}  # fmt: skip


def main() -> None:
    options = _options()
    device = pick_device(options.device)
    if options.threads > len(os.sched_getaffinity(0)):
        sys.exit(
            f"--threads {options.threads}: allowed are up to {len(os.sched_getaffinity(0))}, the cores here"
        )
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    torch.set_num_threads(options.threads)
    waves = clips(options)
    rows = {}
    print(f"{len(waves)} clips of {options.seconds} s at {options.rate} Hz, {options.threads} threads")
    print(f"ours on {device_name(device)}, reference on {device_name(torch.device('cpu'))}")
    print(
        "| feature | clips/s | x real time | bare FFT, clips/s | reference, clips/s | x real time | times as fast |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|")
    with threadpool_limits(options.threads), torch.inference_mode():
        for name in options.only.split(",") if options.only else FEATURES:
            feature = create_feature(name, sample_rate=options.rate).to(device)
            rows[name] = measured(name, feature, waves, device, options)
            print(shown(name, rows[name]), flush=True)
    if options.json:
        about = {name: getattr(options, name) for name in ("rate", "seconds", "threads", "rounds")}
        about |= {"clips": len(waves), "device": device_name(device), "load": os.getloadavg()}
        about |= {"torch": torch.__version__, "librosa": librosa.__version__}
        write_json(options.json, about | {"features": rows})


def measured(
    name: str, feature: Feature, waves: Wave, device: torch.device, options: argparse.Namespace
) -> dict[str, Any]:
    """Clips a second of both, and how many times as fast ours is, in each round."""
    batch = torch.from_numpy(waves).to(device)
    some = waves[: options.reference_clips]

    def reference() -> None:
        for wave in some:
            REFERENCES[name](wave, options.rate, feature.settings)

    calls = {"ours": lambda: feature(batch), "reference": reference}
    if name != "cqt":
        calls["floor"] = lambda: bare_transforms(batch, feature.settings.n_fft, Framing(options.rate).hop)
    timed = time_in_turn(calls, device, options.rounds)
    ours = [len(waves) / seconds for seconds in timed["ours"].seconds]
    theirs = [len(some) / seconds for seconds in timed["reference"].seconds]
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return {
        "clips_s": median(ours),
        "times_real_time": median(ours) * options.seconds,
        "reference_clips_s": median(theirs),
        "reference_times_real_time": median(theirs) * options.seconds,
        "times_as_fast": [median(ratios), min(ratios), max(ratios)],
        "floor_clips_s": len(waves) / median(timed["floor"].seconds) if "floor" in timed else None,
    }


def bare_transforms(batch: torch.Tensor, n_fft: int, hop: int) -> None:
    """The Fourier transforms of a feature's frames and nothing else, clip by clip so that they stay in the cache."""
    for wave in batch:
        torch.fft.rfft(wave.unfold(0, min(n_fft, 4 * hop), hop), n_fft)


def shown(name: str, row: dict[str, Any]) -> str:
    """A line of the table."""
    middle, least, most = row["times_as_fast"]
    floor = "-" if row["floor_clips_s"] is None else f"{row['floor_clips_s']:.1f}"
    return (
        f"| {name} | {row['clips_s']:.1f} | {row['times_real_time']:.0f} | {floor} | {row['reference_clips_s']:.2f} "
        f"| {row['reference_times_real_time']:.1f} | {middle:.1f} ({least:.1f} to {most:.1f}) |"
    )


def clips(options: argparse.Namespace) -> Wave:
    """`[clips, samples]`: sound files of a folder, each cut or repeated to the length, or chords over noise."""
    samples = round(options.seconds * options.rate)
    if options.folder is None:
        rng = np.random.default_rng(0)
        time = np.arange(samples) / options.rate
        pitches = rng.uniform(60, 0.4 * options.rate, (options.clips, 5, 1))
        chords = np.sin(2 * np.pi * pitches * time).sum(1)
        return (0.05 * chords + 0.02 * rng.standard_normal(chords.shape)).astype(np.float32)
    files = sorted(
        path for path in options.folder.iterdir() if path.suffix[1:].upper() in soundfile.available_formats()
    )
    if not files:
        sys.exit(f"{options.folder}: holds no sound files")
    waves = []
    for place in range(options.clips):
        wave, rate = soundfile.read(files[place % len(files)], dtype="float32", always_2d=True)
        wave = librosa.resample(wave.mean(1), orig_sr=rate, target_sr=options.rate)
        waves.append(np.resize(wave, samples))
    return np.stack(waves)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="of sound files; by default clips are made up")
    parser.add_argument("--clips", type=int, default=32, help="in a batch of ours")
    parser.add_argument("--reference-clips", type=int, default=1, help="that the reference takes in a round")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rate", type=int, default=44100)
    parser.add_argument("--threads", type=int, default=1, help="and cores")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help=f"of {','.join(FEATURES)}")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
