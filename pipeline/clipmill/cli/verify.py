"""`pipeline verify`."""

from __future__ import annotations

from dataclasses import asdict

import click

from clipmill.cli import DONE, FAILED, console


@click.command("verify")
@click.argument("shards")
@console.jobs_option
@console.json_option
def command(shards: str, jobs: int, as_json: bool) -> int:
    """Check every shard's and every clip's sha256, every count, and the root hash.

    SHARDS is a folder, a shard, or a brace range such as a/b-{000000..000012}.tar. Ends
    with 1 and names each problem if anything is missing, damaged, extra or miscounted.

    \b
    Example:
      pipeline verify data/tones/shards/webdataset-flac-44100
    """
    from clipmill.shards.read import Shards
    from clipmill.shards.verify import verify

    total = len(Shards.open(shards).files)
    with console.progress("verify", total, "shards") as update:
        verdict = verify(shards, jobs, update)
    if as_json:
        console.print_json(asdict(verdict) | {"sound": not verdict.problems})
    else:
        for problem in verdict.problems:
            click.echo(f"problem: {problem}")
        click.echo(
            f"{'UNSOUND' if verdict.problems else 'sound'}: {verdict.shards} shards, {verdict.clips} clips, "
            f"{verdict.bytes / 1e6:.1f} MB, {len(verdict.problems)} problems"
            + (f"; root sha256 {verdict.root_sha256}" if verdict.root_sha256 else "")
        )
        if verdict.problems:
            console.say("to mend: `pipeline shard` with --overwrite builds the shards anew from the media")
    return FAILED if verdict.problems else DONE
