"""How well copies of real clips are found by fingerprints, and what that costs; beside it, chromaprint.

    python benchmarks/leaks.py DATA               DATA/esc10/audio/*.ogg with esc10.csv, and DATA/fsdd/**/*.wav
    python benchmarks/leaks.py DATA --scale 50000 also: match so many made-up clips of 10 s

Every clip is copied in seven ways, and the copies are looked for among all originals. Ours: `fingerprint` and
`match` as `pipeline leaks` calls them, alone and beside the 2^24 words that 27,000 clips of 10 s have, from where
on keys are longer. Chromaprint: the ffmpeg program's muxer, one process a clip, each
copy laid over its original at every shift, with as many errors allowed as leave no wrong pair, and one in 1000.
Prints JSON: recall of each kind of copy, wrong pairs, and milliseconds of one core for each clip.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import resource
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from clipmill.audio import decode, encode, resample, to_int16
from clipmill.audio import fingerprint as prints
from clipmill.audio.ffmpeg import ffmpeg_program

Wave = NDArray[np.int16]
CHROMAPRINT_LEAST = 8  # words of 32 bits: two seconds


def ffmpeg(data: bytes, *arguments: str) -> bytes:
    command = [ffmpeg_program(), "-loglevel", "error", *arguments, "pipe:"]
    return subprocess.run(command, input=data, capture_output=True, check=True).stdout


def raw(rate: int) -> tuple[str, ...]:
    return "-f", "s16le", "-ar", str(rate), "-ac", "1"


def recoded(wave: Wave, rate: int, codec: str, bits: str, form: str) -> Wave:
    coded = ffmpeg(wave.tobytes(), *raw(rate), "-i", "pipe:", "-c:a", codec, "-b:a", bits, "-f", form)
    return np.frombuffer(ffmpeg(coded, "-i", "pipe:", *raw(rate)), "<i2")


def copies(wave: Wave, rate: int, seed: int) -> dict[str, Wave]:
    """The seven copies; of a clip under 4 s a quarter is cut off, in place of a second."""
    real = wave.astype(np.float32) / np.float32(32768)
    noise = np.random.default_rng(seed).standard_normal(len(real)) * np.sqrt(np.square(real).mean())
    low = 8_000 if rate > 8_000 else 6_000
    return {
        "MP3 64 kbit/s": recoded(wave, rate, "libmp3lame", "64k", "mp3"),
        "Opus 32 kbit/s": recoded(wave, rate, "libopus", "32k", "ogg"),
        "gain -12 dB": to_int16(real / 4),
        "shifted by 0.3 s": np.pad(wave, (round(0.3 * rate), 0)),
        "1 s trimmed": wave[round(min(1.0, len(wave) / rate / 4) * rate) :],
        "resampled to 8 kHz": to_int16(resample(resample(real, rate, low), low, rate)[: len(real)]),
        "noise at 20 dB": to_int16((real + 0.1 * noise).astype(np.float32)),
    }


def load(folder: Path) -> dict[str, list[tuple[str, str, int, Wave]]]:
    """For each collection (name, source, rate, samples) of its clips."""
    with open(folder / "esc10/esc10.csv", newline="", encoding="utf-8") as file:
        sources = {row["filename"]: row["src_file"] for row in csv.DictReader(file)}
    found: dict[str, list[tuple[str, str, int, Wave]]] = {"esc10": [], "fsdd": []}
    for name, pattern in (("esc10", "esc10/audio/*.ogg"), ("fsdd", "fsdd/**/*.wav")):
        for path in sorted(folder.glob(pattern)):
            audio = decode(path)
            source = sources.get(path.name, path.name)
            found[name].append((path.name, source, audio.rate, to_int16(audio.samples)))
    return found


def matched(words: list[NDArray[np.uint16]]) -> set[tuple[int, int]]:
    starts = np.cumsum([0, *map(len, words)])
    found = prints.match(np.concatenate(words), starts)
    return set(zip(found.one.tolist(), found.other.tolist(), strict=True))


def ours(clips: list[tuple[str, str, int, Wave]], copied: list[dict[str, Wave]]) -> dict[str, Any]:
    originals = [prints.fingerprint(wave, rate) for _, _, rate, wave in clips]
    count = len(clips)
    wrong = sorted(
        f"{clips[a][0]} {clips[b][0]}" for a, b in matched(originals) if clips[a][1] != clips[b][1]
    )
    recall: dict[str, dict[str, float]] = {"alone": {}, "large": {}}
    filler = np.random.default_rng(0).integers(1, 1 << 16, 1 << 24, dtype=np.uint16)
    for kind in copied[0]:
        words = [prints.fingerprint(c[kind], clip[2]) for c, clip in zip(copied, clips, strict=True)]
        for name, others in (("alone", []), ("large", [filler])):
            pairs = matched([*originals, *words, *others])
            recall[name][kind] = round(sum((p, p + count) in pairs for p in range(count)) / count, 3)
    sizes = [2 * len(words) for words in originals]
    return {
        "recall": recall,
        "pairs of different sources": wrong,
        "bytes a clip": round(float(np.mean(sizes))),
    }


def chromaprint(wave: Wave, rate: int) -> NDArray[np.uint32]:
    form = ("-f", "chromaprint", "-fp_format", "raw")
    return np.frombuffer(ffmpeg(wave.tobytes(), *raw(rate), "-i", "pipe:", *form), "<u4")


def least_errors(one: NDArray[np.uint32], other: NDArray[np.uint32]) -> float:
    """The least share of bits that differ, over all shifts with enough overlap; 1 where there is none."""
    best = 1.0
    for shift in range(CHROMAPRINT_LEAST - len(one), len(other) - CHROMAPRINT_LEAST + 1):
        first = max(0, -shift)
        count = min(len(one), len(other) - shift) - first
        if count >= CHROMAPRINT_LEAST:
            bits = (one[first : first + count] ^ other[first + shift : first + shift + count]).view(np.uint8)
            best = min(best, float(np.unpackbits(bits).mean()))
    return best


def theirs(clips: list[tuple[str, str, int, Wave]], copied: list[dict[str, Wave]]) -> dict[str, Any]:
    began = time.perf_counter()
    originals = [chromaprint(wave, rate) for _, _, rate, wave in clips]
    cost = (time.perf_counter() - began) / len(clips)
    none = sum(len(words) < CHROMAPRINT_LEAST for words in originals)
    said: dict[str, Any] = {"clips with no fingerprint": none, "ms a clip": round(1e3 * cost, 1)}
    if none == len(clips):
        return said
    rng = np.random.default_rng(0)
    strangers = [
        least_errors(originals[a], originals[b])
        for a, b in rng.integers(len(clips), size=(4000, 2))
        if clips[a][1] != clips[b][1]
    ]
    limits = {"no wrong pair": min(strangers), "1 wrong pair in 1000": float(np.quantile(strangers, 0.001))}
    recall: dict[str, Any] = {name: {"most errors": round(limit, 3)} for name, limit in limits.items()}
    for kind in copied[0]:
        words = [chromaprint(c[kind], clip[2]) for c, clip in zip(copied, clips, strict=True)]
        errors = np.array([least_errors(a, b) for a, b in zip(originals, words, strict=True)])
        for name, limit in limits.items():
            recall[name][kind] = round(float(np.mean(errors < limit)), 3)
    return said | {"recall": recall}


def cost(clips: list[tuple[str, str, int, Wave]]) -> dict[str, float]:
    """Milliseconds a clip of the fingerprint, and of the floor: FLAC decoding, and nothing but the FFTs."""
    flacs = [encode(wave, rate, "flac") for _, _, rate, wave in clips]

    def spent(function: Callable[[int], Any]) -> float:
        began = time.perf_counter()
        for place in range(len(clips)):
            function(place)
        return round(1e3 * (time.perf_counter() - began) / len(clips), 2)

    def ffts(place: int) -> None:
        _, _, rate, wave = clips[place]
        np.fft.rfft(
            np.zeros((max(1, round(len(wave) / rate * prints.WORDS_PER_S)), 1024), np.float32), axis=1
        )

    return {
        "decode": spent(lambda place: soundfile.read(io.BytesIO(flacs[place]), dtype="int16")),
        "FFTs alone": spent(ffts),
        "fingerprint": spent(lambda place: prints.fingerprint(clips[place][3], clips[place][2])),
    }


def scale(count: int) -> dict[str, Any]:
    """Match made-up clips of 625 words, every thousandth of them a copy in which a tenth of the bits differ."""
    rng = np.random.default_rng(0)
    words = rng.integers(1, 1 << 16, (count, 625), dtype=np.uint16)
    planted = np.arange(1, count, 1000)
    flips = np.packbits(rng.random((len(planted), 625, 16)) < 0.1, axis=2).view(np.uint16)[:, :, 0]
    words[planted] = words[planted - 1] ^ flips
    began = time.perf_counter()
    found = prints.match(words.reshape(-1), np.arange(count + 1) * 625)
    return {
        "clips": count,
        "seconds": round(time.perf_counter() - began, 1),
        "peak megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "planted": len(planted),
        "found": len(found.one),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--scale", type=int, help="match so many made-up clips")
    given = parser.parse_args()
    said: dict[str, Any] = {}
    for name, clips in load(given.data).items():
        copied = [copies(wave, rate, seed) for seed, (_, _, rate, wave) in enumerate(clips)]
        said[name] = {
            "clips": len(clips),
            "ours": ours(clips, copied),
            "chromaprint": theirs(clips, copied),
            "ms a clip": cost(clips),
        }
    if given.scale:
        said["scale"] = scale(given.scale)
    print(json.dumps(said, indent=1))


if __name__ == "__main__":
    main()
