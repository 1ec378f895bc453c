"""`pipeline features`: features computed once, kept, and trusted."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipmill.cli import DONE, DONE_IN_PART, FAILED, console

if TYPE_CHECKING:
    from clipmill.features import Feature
    from clipmill.featurestore import Entry, FeatureStore, Made
    from clipmill.featurestore.verify import Verdict
    from clipmill.shards.read import Shards


@click.group("features")
def command() -> None:
    """Compute features of shards once, and keep them in a store: to train from, and to look at.

    \b
    Example:
      pipeline features build data/esc10/shards/webdataset-flac-44100 --feature logmel
      pipeline features list
      pipeline features verify logmel
      pipeline train --features features --feature logmel --fold 1
    """


@command.command("build")
@click.argument("shards", metavar="SHARDS")
@click.option(
    "--feature",
    "names",
    multiple=True,
    required=True,
    metavar="NAME",
    help="What to compute; may be given again.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="A setting, such as n_mels=64; with several features cqt.n_bins=84; may be given again.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "float32"]),
    default="float16",
    show_default=True,
    help="How numbers are kept: float16 takes half the room, and rounds to 11 bits.",
)
@console.store_option
@console.device_option
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=None,
    help="Threads that read ahead, for each file under way; 0: none.  [default: by device and cores]",
)
@click.option(
    "--check-hashes",
    "check",
    is_flag=True,
    help="Compare the sha256 of files that are there, and mend the damaged.",
)
@console.engine_options
@console.json_option
def build_command(
    shards: str,
    names: tuple[str, ...],
    settings: tuple[str, ...],
    dtype: str,
    store: Path,
    device: str,
    workers: int | None,
    check: bool,
    as_json: bool,
    **engine_fields: Any,
) -> int:
    """Compute features of all clips of a folder of shards.

    Each feature with its settings, of these very shards, is an entry of the store. One that is
    there is used again; another setting, dtype or clip makes another entry. Interrupted or killed,
    the same command goes on: finished files are not touched, and what is gone or cut short is
    computed again. One bad clip never ends the job: it becomes a row of failures.jsonl.

    \b
    Example:
      pipeline features build data/esc10/shards/webdataset-flac-44100 --feature logmel
      pipeline features build SHARDS --feature logmel --feature cqt --set cqt.n_bins=84 --device cuda
      pipeline features build SHARDS --feature logmel --set n_mels=64 --dtype float32 --store /scratch/features
      pipeline features build SHARDS --feature logmel --engine slurm --partition cpu --max-jobs 64
    """  # fmt: skip
    from clipmill.features import create_feature
    from clipmill.features.spec import settings_of
    from clipmill.shards.read import Shards

    opened = Shards.open(shards, ours=True)
    chosen = _settings(list(dict.fromkeys(names)), settings)
    features = [
        create_feature(name, **{"sample_rate": opened.sample_rate, **settings_of(name, words)})
        for name, words in chosen.items()
    ]
    made = [_build(opened, one, dtype, store, device, workers, check, engine_fields) for one in features]
    if as_json:
        now = [{"counts": one.counts, "computed_files": one.files, "stopped": one.stopped} for one in made]
        console.print_json([_row(one.entry) | said for one, said in zip(made, now, strict=True)])
    return DONE_IN_PART if any(one.stopped or one.counts["failed"] for one in made) else DONE


def _settings(names: list[str], given: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """The words for each feature, of `--set KEY=VALUE` and `--set FEATURE.KEY=VALUE`."""
    from clipmill.errors import ConfigError

    found: dict[str, dict[str, str]] = {name: {} for name in names}
    for word in given:
        key, equals, value = word.partition("=")
        feature, dot, setting = key.rpartition(".")
        if not equals or not setting:
            raise ConfigError(f"--set {word}: allowed is KEY=VALUE, such as n_mels=64")
        if not dot and len(names) > 1:
            raise ConfigError(f"--set {word}: say of which feature: --set {names[0]}.{word}")
        if dot and feature not in found:
            raise ConfigError(f"--set {word}: {feature} is not asked for; allowed are {', '.join(names)}")
        found[feature if dot else names[0]][setting] = value
    return found


def _build(
    shards: Shards,
    feature: Feature,
    dtype: str,
    store: Path,
    device: str,
    workers: int | None,
    check: bool,
    engine_fields: dict[str, Any],
) -> Made:
    from clipmill.features.spec import FeatureSpec
    from clipmill.featurestore import make_features
    from clipmill.featurestore.job import entry_folder
    from clipmill.train.device import default_workers, pick_device

    folder = entry_folder(store, FeatureSpec.of(feature, shards, dtype), shards)
    if engine_fields["engine"] == "local":
        place = pick_device(device)
        if workers is None:
            workers = default_workers(place, far=shards.far)
        if place.type == "cuda" and engine_fields["jobs"] is None:
            engine_fields = {**engine_fields, "jobs": 1}  # others would only share the device
        device = str(place)
    engine = console.choose_engine(engine_fields, folder)
    what = f"{feature.NAME} of {shards.name}"
    with console.progress(what, len(shards), "clips") as update:
        made = make_features(
            shards, store, feature, dtype,
            engine=engine, device=device, workers=workers or 0, check=check, update=update,
        )  # fmt: skip
    _tell(what, made)
    return made


def _tell(what: str, made: Made) -> None:
    """Say what became of an entry, and what was lost."""
    from clipmill import tables
    from clipmill.types import Failure

    counts, folder = made.counts, made.entry.folder
    if not made.files:
        console.say(f"{what}: all of it is there: {folder}")
    console.say(
        f"{what}: {counts['in']} in = {counts['written']} written + {counts['failed']} failed + "
        f"{counts['skipped']} skipped; in {folder}"
    )
    if made.stopped:
        console.say(f"stopped: {made.stopped}; the same command goes on")
        return
    console.say_losses([Failure(**row) for row in tables.read_jsonl(folder / "failures.jsonl")])
    console.say(f"next: pipeline features verify {made.entry.id} --store {shlex.quote(str(folder.parent))}")


@command.command("list")
@console.store_option
@console.json_option
def list_command(store: Path, as_json: bool) -> int:
    """List what a store holds: features, settings, of which clips, and whether they are finished.

    \b
    Example:
      pipeline features list
      pipeline features list --store /scratch/features --json
    """
    from clipmill.featurestore import FeatureStore

    opened = FeatureStore(store)
    found = [_state(opened, id) for id in opened.ids]
    if as_json:
        console.print_json(found)
        return DONE
    columns = ("entry", "clips", "failed", "size", "built", "what", "state")
    console.print_table("", columns, [_cells(row) for row in found])
    return DONE


def _state(store: FeatureStore, id: str) -> dict[str, Any]:
    """An entry in short, or what is wrong with it."""
    from clipmill.errors import TableError

    try:
        return _row(store.open(id))
    except TableError as error:
        return {"id": id, "state": f"damaged: {error}"}


def _row(entry: Entry) -> dict[str, Any]:
    """An entry in short."""
    info = entry.info
    said: dict[str, Any] = {
        "id": entry.id,
        "folder": str(entry.folder),
        "feature": entry.spec.feature,
        "spec_sha256": entry.spec.sha256,
        "dataset": info["lineage"]["dataset"],
        "shards": info["lineage"]["shards"],
        "what": entry.words,
        "state": "finished" if entry.finished else "unfinished",
    }
    if entry.finished:
        said |= {name: info[name] for name in ("counts", "as_of", "root_sha256")}
        said["bytes"] = sum(one["bytes"] for one in info["shards"])
    return said


def _cells(row: dict[str, Any]) -> tuple[Any, ...]:
    counts = row.get("counts")
    if counts is None:
        return row["id"], "", "", "", "", row.get("what", ""), row["state"]
    size = console.size(row["bytes"])
    return row["id"], counts["written"], counts["failed"], size, row["as_of"][:10], row["what"], row["state"]


@command.command("show")
@click.argument("name", metavar="ENTRY|FEATURE")
@console.store_option
@console.json_option
def show_command(name: str, store: Path, as_json: bool) -> int:
    """Say of an entry what it is, what it was made of, by what and when, and its statistics.

    \b
    Example:
      pipeline features show logmel
      pipeline features show logmel-esc10-1a2b3c4d5e6f --store /scratch/features --json
    """
    from clipmill.featurestore import FeatureStore

    entry = FeatureStore(store).entry(name)
    if as_json:
        console.print_json({"id": entry.id, "spec_sha256": entry.spec.sha256, **entry.info})
        return DONE
    _show(entry)
    return DONE


def _show(entry: Entry) -> None:
    spec, info = entry.spec, entry.info
    about, lineage, counts = info["about"], info["lineage"], info["counts"]
    click.echo(f"{entry.id}: {about['feature']}")
    click.echo(f"  {entry.folder}")
    click.echo(
        f"  {counts['in']} in = {counts['written']} written + {counts['failed']} failed + {counts['skipped']} skipped"
    )
    click.echo(
        f"  {info['bins']} bins, in {about['unit']}; {info['frames_per_s']} frames a second; {spec.dtype}"
    )
    click.echo(f"  spec sha256 {spec.sha256}\n  root sha256 {info['root_sha256']}\n")
    rows = [("version", spec.version), *sorted(spec.settings.items())]
    console.print_table("Settings", ("setting", "value"), rows)
    click.echo()
    dataset = about["dataset"]
    made = [
        ("dataset", lineage["dataset"]),
        *((name, dataset[name]) for name in ("title", "licence", "citation") if dataset.get(name)),
        ("shards", lineage["shards"]),
        ("their root sha256", lineage["root_sha256"]),
        *((name, value) for name, value in spec.sound.items() if name != "versions"),
        *(spec.sound["versions"].items()),
    ]
    console.print_table("Made from", ("what", ""), made)
    click.echo()
    console.print_table(
        "Made by",
        ("device", "kind", "versions"),
        [
            (one["device"], one["kind"], ", ".join(f"{k} {v}" for k, v in one["versions"].items()))
            for one in info["computed"]
        ],
    )
    click.echo(f"on {info['as_of']} (UTC)\n")
    found = entry.statistics
    places = sorted({round(k * (len(found.mean) - 1) / 7) for k in range(8)})
    console.print_table(
        f"Statistics over {found.frames} frames",
        ("bin", f"mean ({about['unit']})", f"standard deviation ({about['unit']})"),
        [(str(place), f"{found.mean[place]:.4g}", f"{found.std[place]:.4g}") for place in places],
    )
    click.echo("(some bins; --json has all)")


# A YouTube id may begin with a dash.
@command.command("get", context_settings={"ignore_unknown_options": True})
@click.argument("key", metavar="KEY")
@click.option(
    "--feature",
    "name",
    metavar="ENTRY|FEATURE",
    default=None,
    help="Which.  [default: the only one in the store]",
)
@console.store_option
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw it into this file.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write it into this .npy file, as it is kept.",
)
@console.json_option
def get_command(
    key: str, name: str | None, store: Path, plot: Path | None, out: Path | None, as_json: bool
) -> int:
    """Read the feature of one clip: its figures, a picture, or the numbers `[bins, frames]` themselves.

    \b
    Example:
      pipeline features get 1-100032-A-0 --feature logmel
      pipeline features get 1-100032-A-0 --feature logmel --plot dog.png
      pipeline features get 1-100032-A-0 --feature logmel --out dog.npy
    """
    import numpy as np

    from clipmill import tables
    from clipmill.errors import ConfigError
    from clipmill.featurestore import FeatureStore

    opened = FeatureStore(store)
    entry = opened.entry(name)
    (values,) = opened.get([key], entry=entry.id, stored=True)
    if plot is not None:
        from clipmill.report.feature_picture import plot_feature

        plot_feature(values.float().numpy(), entry.spec, entry.info["about"]["unit"], key, plot)
        console.say(f"drawn: {plot}")
    if out is not None:
        if out.suffix != ".npy":
            raise ConfigError(f"--out {out}: allowed is a name that ends in .npy")
        with tables.atomic_write(out) as file:
            np.save(file, values.numpy())
        console.say(f"written: {out}")
    wide = values.double()
    said = {
        "key": key,
        "entry": entry.id,
        "shape": list(values.shape),
        "dtype": entry.spec.dtype,
        "unit": entry.info["about"]["unit"],
        "min": wide.min().item(),
        "max": wide.max().item(),
        "mean": wide.mean().item(),
    }
    if as_json:
        console.print_json(said)
    elif plot is None and out is None:
        click.echo(
            f"{key}: {entry.spec.feature} {said['shape']} [bins, frames], {said['dtype']}, in {said['unit']}: min "
            f"{said['min']:.4g}, max {said['max']:.4g}, mean {said['mean']:.4g}"
        )
    return DONE


@command.command("verify")
@click.argument("names", nargs=-1, metavar="[ENTRY|FEATURE]...")
@console.store_option
@click.option(
    "--sample",
    type=click.IntRange(min=0),
    default=100,
    show_default=True,
    help="At least so many clips of each are computed again, and compared.",
)
@click.option("--full", is_flag=True, help="Compute all clips again.")
@click.option(
    "--shards",
    "where",
    metavar="SHARDS",
    default=None,
    help="The sound.  [default: where it lay at the build]",
)
@console.device_option
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=None,
    help="Threads that read the sound ahead.  [default: by device and cores]",
)
@console.jobs_option
@console.json_option
def verify_command(
    names: tuple[str, ...],
    store: Path,
    sample: int,
    full: bool,
    where: str | None,
    device: str,
    workers: int | None,
    jobs: int,
    as_json: bool,
) -> int:
    """Check every byte of entries, and that their numbers come out again.

    Checks each file's sha256, each clip's checksum, structure, tables, counts and statistics; then
    computes clips again from their sound. On the kind of device and with the versions that computed
    them, float32 must be the same to the bit and float16 its rounding; elsewhere a tolerance is
    allowed, which is said. Ends with 1 and names each problem, and the command that mends it.

    \b
    Example:
      pipeline features verify
      pipeline features verify logmel --sample 1000 --device cuda
      pipeline features verify logmel-esc10-1a2b3c4d5e6f --full --shards SHARDS
    """
    from clipmill.featurestore import FeatureStore
    from clipmill.featurestore.verify import verify
    from clipmill.shards.read import Shards
    from clipmill.train.device import default_workers, pick_device

    opened, place = FeatureStore(store), pick_device(device)
    shards = None if where is None else Shards.open(where, ours=True)
    workers = default_workers(place, far=shards is not None and shards.far) if workers is None else workers
    verdicts = []
    for id in [id for name in names for id in opened.named(name)] or opened.ids:
        with console.progress(f"verify {id}", 0, "clips") as update:
            verdict = verify(
                opened.folder / id, shards=shards, sample=None if full else sample, device=place, workers=workers,
                jobs=jobs, update=update,
            )  # fmt: skip
        verdicts.append(verdict)
        if not as_json:
            _tell_verdict(opened, verdict)
    if as_json:
        console.print_json([asdict(verdict) | {"sound": not verdict.problems} for verdict in verdicts])
    return FAILED if any(verdict.problems for verdict in verdicts) else DONE


def _tell_verdict(store: FeatureStore, verdict: Verdict) -> None:
    for problem in verdict.problems:
        click.echo(f"problem: {verdict.entry}: {problem}")
    parity = "nothing was computed again"
    if (found := verdict.parity) is not None:
        apart = f"{found.equal:.4%} of the values, the others differ by {found.most:.2g} at most"
        parity = (
            f"{found.clips} clips computed again on {found.device}: "
            f"{'to the bit' if found.equal == 1 else apart} (allowed: {found.allowed})"
        )
    click.echo(
        f"{'UNSOUND' if verdict.problems else 'sound'}: {verdict.entry}: {verdict.files} files, {verdict.clips} clips, "
        f"{verdict.bytes / 1e6:.1f} MB, {len(verdict.problems)} problems; {parity}"
    )
    for note in verdict.notes:
        console.say(f"note: {note}")
    if verdict.parity is not None and verdict.parity.problems:
        # Its files are as they were written, so no build would touch them.
        console.say(
            f"to mend: pipeline features drop {verdict.entry} --store {shlex.quote(str(store.folder.resolve()))}, "
            "and build it anew"
        )
    elif verdict.problems:
        console.say(f"to mend: {store.mend(verdict.entry)}")


@command.command("drop")
@click.argument("id", metavar="ENTRY")
@console.store_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@console.json_option
def drop_command(id: str, store: Path, yes: bool, as_json: bool) -> int:
    """Remove an entry from a store.

    \b
    Example:
      pipeline features drop logmel-esc10-1a2b3c4d5e6f
      pipeline features drop logmel-esc10-1a2b3c4d5e6f --store /scratch/features --yes
    """
    from clipmill.featurestore import FeatureStore

    opened = FeatureStore(store)
    (chosen,) = opened.named(id, most=1)
    if not yes and not click.confirm(f"remove {opened.folder / chosen}?", err=True):
        console.say(f"kept: {opened.folder / chosen}")
        return FAILED
    opened.drop(chosen)
    if as_json:
        console.print_json({"dropped": chosen})
    else:
        console.say(f"removed: {opened.folder / chosen}")
    return DONE
