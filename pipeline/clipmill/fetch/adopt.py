"""Media already on disk (`--from DIR`): found by name, checked, and taken as fetched where they stand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from clipmill import tables
from clipmill.audio.duration import stated_s
from clipmill.errors import DecodeError
from clipmill.fetch.check import check_media
from clipmill.fetch.find import Found, find_media
from clipmill.fetch.ledger import Ledger, Outcome
from clipmill.fetch.options import SegmentOptions
from clipmill.fetch.others import had_by_others
from clipmill.fetch.watch import Watch
from clipmill.run import Crew, Lost
from clipmill.sources import in_place_order, opened, sized

LEDGER = "ledger"
"""The kind of a source that another fetch's ledger knows."""

_SLACK_S = 1.0
"""A file longer than its clip by no more than this was cut for it; a longer one is the whole video."""

_AT_ONCE = 64
"""Clips that a worker checks one after the other: neighbours in an archive, which is read once for all."""


@dataclass(frozen=True)
class Adoption:
    """A source that may be a clip: the stretch of the video (seconds) that the clip is, and what is let pass.

    `kind`: how its name agrees (`find.KINDS`), or `LEDGER`: `place` is where in it the clip lies.
    """

    key: str
    source: str
    start_s: float | None
    end_s: float | None
    short_s: float = 0.5
    keep_silent: bool = False
    kind: str = "id"
    place: tuple[float | None, float | None] = (None, None)


def adopt_media(
    wanted: pa.Table, ledger: Ledger, media_root: Path, options: SegmentOptions, report: Path, watch: Watch
) -> None:
    """Look for `wanted` (columns of `tables.MANIFEST`) in `options.from_dirs`, and record what is there and sound.

    A source that cannot be used is told, and written to `report` (JSON Lines) with its reason;
    its clip is taken from the next source that could be it, or stays as it was.

    Raises:
        FetchError: one of the folders is none.
    """
    media, found = candidates(options.from_dirs, wanted)
    for warning in (*found.warnings, *(() if media.num_rows else found.barren)):
        watch.say(warning)
    if found.duplicates:
        watch.say(f"{found.duplicates} clips have several sources; the first that is fit is taken")
    splits = dict(zip(wanted["key"].to_pylist(), wanted["split"].to_pylist(), strict=True))
    firsts = pc.sum(pc.equal(media["turn"], 0)).as_py() or 0
    watch.total("adopt", firsts, "clips")
    had, unfit, waiting = 0, [], media["key"]
    for turn in range((pc.max(media["turn"]).as_py() or 0) + 1):
        now = media.filter(
            pc.and_(pc.equal(media["turn"], turn), pc.is_in(media["key"], waiting.combine_chunks()))
        )
        missed = []
        for outcome in _adopt_all(_units(now, wanted, media_root, options), options):
            if outcome.had:
                had += 1
                ledger.record(outcome, splits[outcome.key])
            else:
                missed.append(outcome.key)
                unfit.append(
                    {name: getattr(outcome, name) for name in ("key", "source", "reason", "message")}
                )
            watch.update(had, f"had {had}, unfit {len(unfit)}")
        waiting = pa.chunked_array([pa.array(missed, pa.string())])
    watch.say(f"adopted {had} of {wanted.num_rows} clips wanted, read where they stand")
    report.unlink(missing_ok=True)
    if unfit:
        tables.write_jsonl(report, tables.in_order(unfit))
        reasons = ", ".join(
            f"{reason} {n}" for reason, n in sorted(Counter(u["reason"] for u in unfit).items())
        )
        watch.say(f"  {len(unfit)} sources cannot be used ({reasons}): {report}")


def candidates(dirs: Sequence[Path], wanted: pa.Table) -> tuple[pa.Table, Found]:
    """What the folders hold of `wanted`: what a fetch of ours had there (see `others`), then media by their names.

    Returns:
        A table of key, source, kind, turn (see `Found`) and, of what a fetch of ours had,
        start_s and end_s; and what finding the media came to.

    Raises:
        FetchError: one of the folders is none.
    """
    warnings: list[str] = []
    others = had_by_others(dirs, wanted, warnings)
    found = find_media(dirs, wanted)
    found.warnings[:0] = warnings
    later = pc.cast(pc.is_in(found.media["key"], others["key"].combine_chunks()), pa.int32())
    media = found.media.set_column(3, "turn", pc.add(found.media["turn"], later))
    known = others.append_column("kind", pa.repeat(LEDGER, others.num_rows))
    known = known.append_column("turn", pa.repeat(pa.scalar(0, pa.int32()), others.num_rows))
    return pa.concat_tables([known, media], promote_options="default"), found


def adopt(job: Adoption, media_root: Path = Path("/")) -> Outcome:
    """Whether a source is its clip, and which stretch of it: that goes into the outcome.

    A source about as long as the clip is the clip, less what it has too much; a longer one is
    the whole video, and is read from the clip's start to its end.
    """
    wanted_s = None if job.end_s is None else job.end_s - (job.start_s or 0.0)
    try:
        with opened(media_root, job.source) as path:
            size = path.stat().st_size if path.exists() else None
            start_s, end_s = job.place if job.kind == LEDGER else _stretch(job, wanted_s, stated_s(path))
            checked = check_media(
                path, start_s, end_s, wanted_s or 0.0, short_s=job.short_s, keep_silent=job.keep_silent
            )
    except DecodeError as error:
        return Outcome(job.key, error.reason, str(error), job.source)
    except (OSError, MemoryError) as error:  # it went while it was read, or fits in no memory
        return Outcome(job.key, "unreadable", str(error) or "needs more memory than there is", job.source)
    source = sized(job.source, size)
    return Outcome(job.key, "", "", source, size, checked.sha256, checked.duration_s, start_s, end_s)


def _stretch(
    job: Adoption, wanted_s: float | None, stated: float | None
) -> tuple[float | None, float | None]:
    """Which stretch of a source that says it lasts `stated` seconds is the clip; None: from its start, to its end."""
    if wanted_s is None or stated is None or stated <= wanted_s:
        return None, None
    # A name that tells the clip's start says that the file was cut there, however long it is.
    if stated <= wanted_s + _SLACK_S or job.kind != "id":
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
    """The sources, a few at a time, neighbours together."""
    media = media.take(in_place_order(media["source"]))
    place = pc.index_in(media["key"], wanted["key"].combine_chunks())
    for first in range(0, media.num_rows, _AT_ONCE):
        clips = wanted.select(["key", "start_s", "end_s"]).take(place.slice(first, _AT_ONCE)).to_pylist()
        rows = media.slice(first, _AT_ONCE).to_pylist()
        yield (
            media_root,
            [
                Adoption(
                    **clip,
                    source=row["source"],
                    short_s=options.allow_short,
                    keep_silent=options.keep_silent,
                    kind=row["kind"],
                    place=(row["start_s"], row["end_s"]),
                )
                for clip, row in zip(clips, rows, strict=True)
            ],
        )


def _adopt_all(units: Iterator[Unit], options: SegmentOptions) -> Iterator[Outcome]:
    """What each source comes to, in any order; one that hangs or takes its worker with it costs itself alone."""
    alone: list[Unit] = []
    with Crew(_adopt_unit, options.jobs) as crew:
        unit = next(units, None)
        while unit or alone or crew.in_flight:
            while crew.free and (unit or alone):
                if alone:
                    crew.give(alone.pop(), options.timeout)
                elif unit:
                    crew.give(unit, options.timeout * max(1.0, len(unit[1]) / 4))
                    unit = next(units, None)
            for (media_root, jobs), answer in crew.results(1.0):
                if not isinstance(answer, Lost):
                    yield from answer
                elif len(jobs) > 1:  # one of them did it: each by itself
                    alone += [(media_root, [job]) for job in jobs]
                else:
                    yield Outcome(jobs[0].key, answer.reason, answer.message, jobs[0].source)


def _adopt_unit(unit: Unit) -> list[Outcome]:
    media_root, jobs = unit
    return [adopt(job, media_root) for job in jobs]
