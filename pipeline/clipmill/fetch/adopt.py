"""Media already on disk (`--from DIR`): found by name, checked, and taken as fetched where they stand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from clipmill.audio.duration import stated_s
from clipmill.errors import DecodeError
from clipmill.fetch.check import check_media
from clipmill.fetch.find import find_media
from clipmill.fetch.ledger import Ledger, Outcome
from clipmill.fetch.options import SegmentOptions
from clipmill.fetch.watch import Watch
from clipmill.run import run_units
from clipmill.sources import in_place_order, opened

_SLACK_S = 1.0
"""A file longer than its clip by no more than this was cut for it; a longer one is the whole video."""

_AT_ONCE = 64
"""Clips that a worker checks one after the other: neighbours in an archive, which is read once for all."""


@dataclass(frozen=True)
class Adoption:
    """A source that may be a clip: the stretch of the video (seconds) that the clip is, and what is let pass."""

    key: str
    source: str
    start_s: float | None
    end_s: float | None
    short_s: float = 0.5
    keep_silent: bool = False


def adopt_media(
    wanted: pa.Table, ledger: Ledger, media_root: Path, options: SegmentOptions, watch: Watch
) -> None:
    """Look for `wanted` (columns of `tables.MANIFEST`) in `options.from_dirs`, and record what is there and sound.

    What is there and cannot be used is told, and not recorded: it is as if it were not there.

    Raises:
        FetchError: one of the folders is none.
        RunError: a worker process died.
    """
    found = find_media(options.from_dirs, wanted)
    for warning in found.warnings:
        watch.say(warning)
    if found.duplicates:
        watch.say(f"{found.duplicates} clips have several sources; the first in order was taken")
    watch.total("adopt", found.media.num_rows, "clips")
    splits = dict(zip(wanted["key"].to_pylist(), wanted["split"].to_pylist(), strict=True))
    had, unfit, example = 0, Counter[str](), ""
    units = _units(found.media, wanted, media_root, options)
    for outcomes in run_units(_adopt_all, units, options.jobs):
        for outcome in outcomes:
            if outcome.had:
                had += 1
                ledger.record(outcome, splits[outcome.key])
            else:
                unfit[outcome.reason] += 1
                example = example or f"{outcome.source}: {outcome.reason}: {outcome.message}"
        watch.update(had + unfit.total(), f"had {had}, unfit {unfit.total()}")
    watch.say(f"adopted {had} of {wanted.num_rows} clips wanted, read where they stand")
    if unfit:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(unfit.items()))
        watch.say(f"  {unfit.total()} sources found cannot be used ({reasons}), such as {example}")


def adopt(job: Adoption, media_root: Path = Path("/")) -> Outcome:
    """Whether a source is its clip, and which stretch of it: that goes into the outcome.

    A source about as long as the clip is the clip, less what it has too much; a longer one is
    the whole video, and is read from the clip's start to its end.
    """
    wanted_s = None if job.end_s is None else job.end_s - (job.start_s or 0.0)
    try:
        with opened(media_root, job.source) as path:
            size = path.stat().st_size if path.exists() else None
            start_s, end_s = _stretch(job, wanted_s, stated_s(path))
            checked = check_media(
                path, start_s, end_s, wanted_s or 0.0, short_s=job.short_s, keep_silent=job.keep_silent
            )
    except DecodeError as error:
        return Outcome(job.key, error.reason, str(error), job.source)
    except (OSError, MemoryError) as error:  # it went while it was read, or fits in no memory
        return Outcome(job.key, "unreadable", str(error) or "needs more memory than there is", job.source)
    return Outcome(job.key, "", "", job.source, size, checked.sha256, checked.duration_s, start_s, end_s)


def _stretch(
    job: Adoption, wanted_s: float | None, stated: float | None
) -> tuple[float | None, float | None]:
    """Which stretch of a source that says it lasts `stated` seconds is the clip; None: from its start, to its end."""
    if wanted_s is None or stated is None or stated <= wanted_s:
        return None, None
    if stated <= wanted_s + _SLACK_S:
        return None, wanted_s
    if stated + job.short_s >= (job.end_s or 0.0):
        return job.start_s, job.end_s
    raise DecodeError(
        "too-short",
        f"lasts {stated:.2f} s: more than the clip of {wanted_s:g} s, and less than a video "
        f"that holds it up to {job.end_s:g} s",
    )


Unit = tuple[Path, list[Adoption]]


def _units(media: pa.Table, wanted: pa.Table, media_root: Path, options: SegmentOptions) -> Iterator[Unit]:
    """The sources found, a few at a time, neighbours together."""
    media = media.take(in_place_order(media["source"]))
    place = pc.index_in(media["key"], wanted["key"].combine_chunks())
    for first in range(0, media.num_rows, _AT_ONCE):
        rows = wanted.select(["key", "start_s", "end_s"]).take(place.slice(first, _AT_ONCE))
        sources = media["source"].slice(first, _AT_ONCE).to_pylist()
        yield (
            media_root,
            [
                Adoption(source=source, short_s=options.allow_short, keep_silent=options.keep_silent, **row)
                for source, row in zip(sources, rows.to_pylist(), strict=True)
            ],
        )


def _adopt_all(unit: Unit) -> list[Outcome]:
    media_root, jobs = unit
    return [adopt(job, media_root) for job in jobs]
