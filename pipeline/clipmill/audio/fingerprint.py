"""Acoustic fingerprints: which clips are copies of one recording, whatever became of their bytes.

One word of 16 bits for each 16 ms, after Haitsma and Kalker (ISMIR 2002): each bit says whether
the energy of a band, less that of the next, rose or fell since the frame before the last. A codec,
another gain, another rate and some noise flip few of these bits; another recording flips half.

Copies are found through keys, a few words that stand a moment apart: clips that share a key are laid
over each other there, and the share of bits that differ in the whole overlap decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from clipmill.audio.convert import resample

VERSION = 1
"""Raise it whenever the same samples would give other words: kept fingerprints are then made anew."""

RATE = 8_000
HOP = 128
"""Samples at `RATE` from one word to the next."""

BITS = 16
WORDS_PER_S = RATE / HOP

MOST_ERRORS = 0.3
"""Share of bits that may differ between copies; 0.5 is what strangers have."""

LEAST_EVIDENCE = 13.0
"""(1 - 2 x errors) x sqrt(bits compared): the shorter the overlap, the fewer errors it may have."""

LEAST_WORDS = 11
"""Fewer words that tell something are no evidence even where all bits agree."""

NEIGHBOURS = 32
"""Of the clips that share a key, each is compared with so many that follow; a key with more is crowded."""

_WINDOW = 1024  # 128 ms: resolves the lowest band, 46 Hz wide, and is short beside a spoken digit
_LAG = 2  # frames
_LOW_HZ, _HIGH_HZ = 300.0, 3400.0  # what an 8 kHz copy still has
_BLOCK = 4096  # frames at once, so that an hour of sound needs no more memory than a minute
_QUIET = 1e-4  # of the clip's loudest frame: 40 dB below it is what codecs change at will
_SILENT = 10.0 ** (-80 / 10)  # mean square re full scale: near the last of 16 bits
_STEADY = 0.01  # change in relation to energy: a hum says nothing of where it was recorded

_KEY_BITS = 12  # of each word: the lower bands, which codecs change least
_APART = 6  # words from one part of a key to the next
_AROUND = np.array([-15, -12, -9, -6, -3, 3, 9, 12, 15, 18, 21])  # words around a shared key, compared first
_AROUND_ERRORS = 0.35
_LONGER_KEYS = (1 << 24, 1 << 28)  # with more words than this in all, keys have a third and a fourth part
_KEYS_AT_ONCE = 1 << 24
_PAIRS_AT_ONCE = 1 << 18
_WORDS_AT_ONCE = 1 << 23
_ONES = np.array([value.bit_count() for value in range(1 << BITS)], np.uint8)

Words = NDArray[np.uint16]
Places = NDArray[np.int64]


@dataclass(frozen=True)
class Matches:
    """Pairs of clips with one recording in them; arrays `[pairs]`, each pair once, `one` < `other`.

    `shift`: what is word `i` in `one` is word `i + shift` in `other`. `errors`: share of bits that
    differ, of those of `words` pairs of words. `crowded`: keys with more clips than were all compared.
    """

    one: Places
    other: Places
    shift: Places
    errors: NDArray[np.float64]
    words: Places
    crowded: int


def fingerprint(samples: NDArray[np.int16], rate: int) -> NDArray[np.uint16]:
    """The words of a clip, uint16 `[words]`, from int16 mono `[samples]` at `rate` Hz.

    Word `i` is of the sound around `i * HOP / RATE` seconds. 0 says nothing: it is quiet there, or steady.
    """
    wave = resample(samples.astype(np.float32) / np.float32(32768.0), rate, RATE)
    wave = np.pad(wave, _WINDOW // 2)
    frames = np.lib.stride_tricks.sliding_window_view(wave, _WINDOW)[::HOP]
    window, bank = _bank()
    blocks = (np.fft.rfft(frames[at : at + _BLOCK] * window, axis=1) for at in range(0, len(frames), _BLOCK))
    energy = np.concatenate(
        [(np.square(b.real) + np.square(b.imag)).astype(np.float32) @ bank for b in blocks]
    )
    if len(energy) <= _LAG:
        return np.zeros(0, np.uint16)
    slope = energy[:, :-1] - energy[:, 1:]
    words = np.packbits(slope[_LAG:] > slope[:-_LAG], axis=1, bitorder="little").view("<u2")[:, 0]
    both = (energy[_LAG:] + energy[:-_LAG]).sum(axis=1)
    change = np.abs(energy[_LAG:] - energy[:-_LAG]).sum(axis=1)
    # Parseval, for a Hann window: the sum over half the bins of a frame of mean square 1.
    floor = _SILENT * _WINDOW * float(np.square(window).sum()) / 2
    telling = (both > 2 * floor) & (both > _QUIET * both.max()) & (change > _STEADY * both)
    return np.where(telling, words, 0).astype(np.uint16)


@lru_cache(maxsize=1)
def _bank() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The Hann window, and the share of each bin in each of 17 bands that are equally wide in octaves."""
    edges = np.geomspace(_LOW_HZ, _HIGH_HZ, BITS + 2)
    width = RATE / _WINDOW
    centres = np.arange(_WINDOW // 2 + 1)[:, None] * width
    inside = np.minimum(centres + width / 2, edges[1:]) - np.maximum(centres - width / 2, edges[:-1])
    shares = np.clip(inside / width, 0.0, 1.0)
    return np.hanning(_WINDOW).astype(np.float32), shares.astype(np.float32)


def match(words: Words, starts: Places) -> Matches:
    """The pairs of clips that are copies of, or overlap in, one recording.

    `words` are those of all clips, one after the other; clip `i` has `words[starts[i]:starts[i + 1]]`.
    The more words there are, the longer are the keys: what strangers share by chance grows with the square.
    """
    parts = 2 + sum(len(words) > limit for limit in _LONGER_KEYS)
    passes = -(-len(words) // _KEYS_AT_ONCE)
    found = [np.zeros((0, 5))]
    crowded = 0
    for number in range(passes):
        keys, places = _keys(words, starts, parts, number, passes)
        clips = np.searchsorted(starts, places, "right") - 1
        # What repeats itself, such as a clock, would otherwise fill its keys with itself.
        fresh = np.ones(len(keys), bool)
        fresh[1:] = (keys[1:] != keys[:-1]) | (clips[1:] != clips[:-1])
        keys, places, clips = keys[fresh], places[fresh], clips[fresh]
        for step in range(1, min(NEIGHBOURS, len(keys) - 1) + 1):
            same = np.flatnonzero(keys[step:] == keys[:-step])
            if not len(same):
                break
            for at in range(0, len(same), _PAIRS_AT_ONCE):
                some = same[at : at + _PAIRS_AT_ONCE]
                pairs = _alike_around(words, starts, clips, places, some, some + step)
                found += [_overlap(words, starts, block) for block in _blocks(pairs, starts)]
        crowded += _crowded(keys)
    return _best(np.concatenate(found), crowded)


def _keys(
    words: Words, starts: Places, parts: int, number: int, passes: int
) -> tuple[NDArray[np.uint64], Places]:
    """The keys that fall to one of the passes, in order, and the places where they begin."""
    span = (parts - 1) * _APART
    all_keys, all_places = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for begin in range(0, len(words) - span, _KEYS_AT_ONCE):
        end = min(begin + _KEYS_AT_ONCE, len(words) - span)
        keys = np.zeros(end - begin, np.uint64)
        told = np.ones(end - begin, bool)
        for part in range(0, span + 1, _APART):
            word = words[begin + part : end + part]
            keys = keys << np.uint64(_KEY_BITS) | (word & ((1 << _KEY_BITS) - 1)).astype(np.uint64)
            told &= word != 0
        mixed = keys * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)
        places = begin + np.flatnonzero(told & (mixed % np.uint64(passes) == np.uint64(number)))
        inside = places + span < starts[np.searchsorted(starts, places, "right")]
        all_keys.append(keys[places[inside] - begin])
        all_places.append(places[inside])
    joined, where = np.concatenate(all_keys), np.concatenate(all_places)
    order = np.argsort(joined, kind="stable")
    return joined[order], where[order]


def _alike_around(
    words: Words, starts: Places, clips: Places, places: Places, first: Places, second: Places
) -> Places:
    """`[pairs, 3]`: clip, other clip and shift, each once, where the words around a shared key agree too."""
    sides = []
    for rows in (first, second):
        around = places[rows, None] + _AROUND
        inside = (around >= starts[clips[rows], None]) & (around < starts[clips[rows] + 1, None])
        sides.append(np.where(inside, words[np.clip(around, 0, len(words) - 1)], 0))
    told = (sides[0] != 0) & (sides[1] != 0)
    errors = (_ONES[sides[0] ^ sides[1]] * told).sum(axis=1)
    alike = errors <= _AROUND_ERRORS * BITS * told.sum(axis=1)
    one, other = first[alike], second[alike]
    shift = (places[other] - starts[clips[other]]) - (places[one] - starts[clips[one]])
    return np.unique(np.stack([clips[one], clips[other], shift], axis=1), axis=0)


def _blocks(pairs: Places, starts: Places) -> Iterator[Places]:
    """Pairs in blocks of a bounded number of words to compare."""
    lengths = np.minimum(*(starts[pairs[:, side] + 1] - starts[pairs[:, side]] for side in (0, 1)))
    block = np.cumsum(lengths) // _WORDS_AT_ONCE
    return iter(np.split(pairs, np.flatnonzero(np.diff(block)) + 1)) if len(pairs) else iter(())


def _overlap(words: Words, starts: Places, pairs: Places) -> NDArray[np.float64]:
    """`[copies, 5]`: clip, other clip, shift, errors and words compared of the pairs that are copies."""
    one, other, shift = pairs.T
    begin = np.maximum(0, -shift)
    lengths = np.minimum(starts[one + 1] - starts[one], starts[other + 1] - starts[other] - shift) - begin
    firsts = np.cumsum(lengths) - lengths
    along = np.arange(lengths.sum()) - np.repeat(firsts, lengths)
    left = words[along + np.repeat(starts[one] + begin, lengths)]
    right = words[along + np.repeat(starts[other] + begin + shift, lengths)]
    told = (left != 0) & (right != 0)
    count = np.add.reduceat(told, firsts, dtype=np.int64)
    errors = np.add.reduceat(_ONES[left ^ right] * told, firsts, dtype=np.int64) / np.maximum(count * BITS, 1)
    copies = (errors <= MOST_ERRORS) & (_evidence(errors, count) >= LEAST_EVIDENCE)
    return np.column_stack([pairs, errors, count])[copies]


def _evidence(errors: NDArray[np.float64], count: NDArray[np.number]) -> NDArray[np.float64]:
    return (1 - 2 * errors) * np.sqrt(count * BITS)


def _crowded(keys: NDArray[np.uint64]) -> int:
    """How many different keys have more places than are all compared with each other."""
    beyond = keys[NEIGHBOURS + 1 :]
    return len(np.unique(beyond[beyond == keys[: len(beyond)]]))


def _best(found: NDArray[np.float64], crowded: int) -> Matches:
    """Of each pair of clips the shift with the most evidence."""
    found = found[np.lexsort((-_evidence(found[:, 3], found[:, 4]), found[:, 1], found[:, 0]))]
    first = np.ones(len(found), bool)
    first[1:] = (found[1:, :2] != found[:-1, :2]).any(axis=1)
    one, other, shift, errors, count = found[first].T
    whole = [column.astype(np.int64) for column in (one, other, shift, count)]
    return Matches(whole[0], whole[1], whole[2], errors, whole[3], crowded)
