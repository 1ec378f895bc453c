"""What the datasets that come as one archive share: where to get it, and what of it is already here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pyarrow.compute as pc

from clipmill.datasets import Prepared, Remote, option
from clipmill.datasets.folds import check_groups
from clipmill.errors import ConfigError, FetchError
from clipmill_manifests import facts

MEDIA_FOLDER = "media"
"""Where, in a dataset's own folder, its archive is unpacked."""


@dataclass(frozen=True)
class Archived:
    """A dataset that is one archive: downloaded, given as a file, or unpacked already."""

    from_dir: Path | None = option(
        None, flag="--from", help="The archive as you unpacked it; nothing is downloaded."
    )
    archive: Path | None = option(None, help="The archive, if you have it already; it is checked, and kept.")
    mirror: tuple[str, ...] = option(
        (),
        help="Another address of the archive, asked where the official ones fail; may be repeated.",
    )
    keep_archive: bool = option(False, help="Keep the downloaded archive once it is unpacked.")
    no_checksum: bool = option(False, help="Take an archive of another size or checksum than the one known.")
    allow_leak: bool = option(False, help="Let a group stand in several folds or splits.")

    KIND: ClassVar[str]
    LANDMARK: ClassVar[str]
    """A file or folder by which the root of what was unpacked is known."""

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ConfigError: naming the flag, what was found and what is allowed.
        """
        if self.from_dir is not None and self.archive is not None:
            raise ConfigError("--from DIR and --archive FILE both name the media: give one of them")
        for url in self.mirror:
            if not url.startswith(("http://", "https://")):
                raise ConfigError(
                    f"--mirror {url!r}: expected http:// or https://; --archive FILE takes a file"
                )

    @property
    def name(self) -> str:
        """The dataset's own name."""
        return self.KIND

    @property
    def needs(self) -> tuple[Remote, ...]:
        """The archive, unless it was unpacked already."""
        if self.from_dir is not None:
            return ()
        return tuple(
            Remote(file["file"], (*file["urls"], *self.mirror), file.get("size"), file.get("checksum"))
            for file in facts(self.KIND)["files"]
        )

    def hints(self) -> list[str]:
        """What a user of its folds must know."""
        groups = facts(self.KIND).get("straddling", [])
        return groups and [
            f"note: {len(groups)} of its recordings stand in two official folds each ({', '.join(groups)}); "
            "`pipeline train --fold` refuses a fold that they leak into without --allow-leak"
        ]

    def root(self, dest: Path) -> Path:
        """The folder with the landmark, of what was unpacked. See `root_in`."""
        return self.root_in(self.from_dir or dest / MEDIA_FOLDER)

    def root_in(self, given: Path) -> Path:
        """The folder with the landmark: the one given, or one in it.

        Raises:
            FetchError: neither has it.
        """
        for folder in [given.resolve(), *sorted(given.resolve().glob("*/"))]:
            if (folder / self.LANDMARK).exists():
                return folder
        archive = facts(self.KIND)["files"][0]
        what = (
            f"--from {given}"
            if self.from_dir
            else f"--archive {self.archive}"
            if self.archive
            else str(given)
        )
        raise FetchError(f"{what}: has no {self.LANDMARK}; expected is what {archive['urls'][0]} holds")

    def grouped(self, prepared: Prepared, namespace: str) -> Prepared:
        """The clips with their groups named so that they cannot meet another collection's; checked.

        Raises:
            TableError: a group straddles folds or splits, and --allow-leak was not given.
        """
        groups = pc.binary_join_element_wise(namespace, prepared.manifest["group"], "-")
        place = prepared.manifest.schema.get_field_index("group")
        manifest = prepared.manifest.set_column(place, "group", groups)
        if not self.allow_leak:
            check_groups(
                manifest, [f"{namespace}-{group}" for group in facts(self.KIND).get("straddling", ())]
            )
        return replace(prepared, manifest=manifest)
