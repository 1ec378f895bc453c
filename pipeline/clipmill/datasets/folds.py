"""Hold that what belongs together stays together: no group on both sides of a fold or a split."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from clipmill.errors import TableError
from clipmill.types import TRAIN_SPLITS

_SCORED = ("valid", "eval")


def check_groups(manifest: pa.Table, known: Sequence[str] = ()) -> None:
    """Raise where a group straddles folds, or the splits that are trained on and scored.

    A model tested on another clip of a recording, speaker or video that it was trained on
    scores better than it is. Clips without a group, and without fold and split, do not count;
    nor do the groups `known` to straddle in a collection's official folds.

    Raises:
        TableError: naming up to three groups, where their clips stand, and the flag that mends it.
    """
    splits = pc.if_else(pc.is_in(manifest["split"], pa.array(TRAIN_SPLITS)), "train", manifest["split"])
    sides = {
        "fold": pc.cast(manifest["fold"], pa.string()),
        "split": pc.if_else(
            pc.is_in(splits, pa.array(("train", *_SCORED))), splits, pa.scalar(None, pa.string())
        ),
    }
    for name, side in sides.items():
        table = pa.table({"group": manifest["group"], "side": side})
        table = table.filter(pc.and_(table["group"].is_valid(), table["side"].is_valid()))
        clips = table.group_by(["group", "side"]).aggregate([([], "count_all")])
        several = clips.group_by("group").aggregate([([], "count_all")])
        several = several.filter(pc.greater(several["count_all"], 1)).sort_by("group")
        straddling = [group for group in several["group"].to_pylist() if group not in known]
        if straddling:
            raise TableError(_evidence(name, straddling, clips))


def _evidence(name: str, straddling: list[str], clips: pa.Table) -> str:
    lines = []
    for group in straddling[:3]:
        rows = clips.filter(pc.equal(clips["group"], group)).to_pylist()
        rows.sort(key=lambda row: (len(row["side"]), row["side"]))
        where = ", ".join(f"{row['count_all']} clips in {name} {row['side']}" for row in rows)
        lines.append(f"\n  {group}: {where}")
    more = f"\n  and {len(straddling) - 3} more" if len(straddling) > 3 else ""
    return (
        f"{len(straddling)} groups stand in several {name}s, where each should keep to one:{''.join(lines)}{more}\n"
        f"Mend the {name}s or the groups, or take them as they are with --allow-leak"
    )
