"""`fetch.unpack`: archives made by hand to do what an archive must not."""

from __future__ import annotations

import io
import os
import signal
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmill.errors import FetchError
from clipmill.fetch import unpack as unpacking
from clipmill.fetch.unpack import NOTE_FILE, unpack


def member(name: str, data: bytes = b"data", **facts: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for fact, value in facts.items():
        setattr(info, fact, value)
    return info, data


def tar(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for info, data in members:
            archive.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return path


def zipped(path: Path, files: dict[str, bytes], mode: int | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            if mode is not None:
                info.external_attr = mode << 16
            archive.writestr(info, data)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != NOTE_FILE
    }


def refused(archive: Path, said: str, **limits: int) -> None:
    """It is refused with these words, and neither the folder nor anything beside it stays."""
    before = sorted(archive.parent.iterdir())
    with pytest.raises(FetchError, match=said) as caught:
        unpack(archive, archive.parent / "media", **limits)
    assert str(archive) in str(caught.value)
    assert sorted(archive.parent.iterdir()) == before


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_is_unpacked_however_it_is_packed(tmp_path, mode):
    members = [
        member("./top/a.wav", b"a" * 3_000_000),
        member("top/b/c.wav", b""),
        member("top/empty", type=tarfile.DIRTYPE),
    ]
    unpack(tar(tmp_path / "x.tar", *members, mode=mode), tmp_path / "media", note={"checksum": "md5:0"})
    assert tree(tmp_path / "media") == {"top/a.wav": b"a" * 3_000_000, "top/b/c.wav": b""}
    assert (tmp_path / "media/top/empty").is_dir()
    assert '"md5:0"' in (tmp_path / "media" / NOTE_FILE).read_text()


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.from_regex(r"[a-zé .#]{0,3}[a-z]", fullmatch=True), st.binary(max_size=200), min_size=1, max_size=6
    )
)
def test_what_was_packed_comes_out(tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("law")
    files = {f"top/{name}": data for name, data in files.items() if not name.startswith("._")}
    unpack(zipped(folder / "x.zip", files), folder / "z")
    unpack(tar(folder / "x.tar", *(member(name, data) for name, data in files.items())), folder / "t")
    assert tree(folder / "z") == tree(folder / "t") == files


def test_what_only_a_mac_wants_is_left_out(tmp_path):
    files = {"__MACOSX/a/._b.wav": b"x", "a/._b.wav": b"x", "a/.DS_Store": b"x", "a/b.wav": b"sound"}
    assert tree(unpack(zipped(tmp_path / "x.zip", files), tmp_path / "media")) == {"a/b.wav": b"sound"}


def test_modes_and_owners_of_the_archive_are_not_taken_over(tmp_path):
    archive = tar(
        tmp_path / "x.tar", member("a/run", mode=0o6777, uid=12345), member("a", type=tarfile.DIRTYPE, mode=0)
    )
    unpack(archive, tmp_path / "media")
    status = (tmp_path / "media/a/run").stat()
    assert (status.st_mode & (stat.S_ISUID | stat.S_ISGID | 0o111), status.st_uid) == (0, os.getuid())


@pytest.mark.parametrize("name", ["../out.wav", "a/../../out.wav", "/etc/out.wav", "a/.."])
def test_a_path_that_leads_out_is_refused(tmp_path, name):
    refused(zipped(tmp_path / "x.zip", {"fine.wav": b"", name: b"x"}), "outside its folder")
    refused(tar(tmp_path / "x.tar", member("fine.wav"), member(name)), "outside its folder")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (tarfile.SYMTYPE, "is a link"),
        (tarfile.LNKTYPE, "is a link"),
        (tarfile.FIFOTYPE, "is a device, pipe"),
        (tarfile.CHRTYPE, "is a device, pipe"),
        (tarfile.BLKTYPE, "is a device, pipe"),
    ],
)
def test_links_devices_and_pipes_are_refused(tmp_path, kind, said):
    refused(
        tar(tmp_path / "x.tar", member("fine.wav"), member("it", b"", type=kind, linkname="/etc/passwd")),
        said,
    )


@pytest.mark.parametrize(("kind", "said"), [(stat.S_IFLNK, "is a link"), (stat.S_IFIFO, "is a device, pipe")])
def test_a_zip_can_hold_links_too_and_they_are_refused(tmp_path, kind, said):
    refused(zipped(tmp_path / "x.zip", {"it": b"/etc/passwd"}, mode=kind | 0o777), said)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_bomb_is_stopped_before_it_fills_the_disk(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(unpacking, "_FREE_BYTES", 1 << 20)
    bomb = b"\0" * (40 << 20)
    refused(zipped(tmp_path / "x.zip", {"a.wav": bomb}), "unpacks to more than")
    refused(tar(tmp_path / "x.tar.gz", member("a.wav", bomb)), "unpacks to more than")
    refused(
        tar(tmp_path / "y.tar", member("a.wav", b"\0" * 5000), mode=mode),
        "more than 4000 bytes",
        max_bytes=4000,
    )


def test_a_zip_that_lies_about_a_size_is_counted_by_what_comes_out(tmp_path):
    archive = zipped(tmp_path / "x.zip", {"a.wav": b"\0" * 50_000})
    archive.write_bytes(
        archive.read_bytes().replace((50_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    )
    refused(archive, "is damaged")


def test_more_files_than_any_collection_has_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(unpacking, "MAX_MEMBERS", 20)
    refused(tar(tmp_path / "x.tar", *(member(str(n)) for n in range(21))), "more than 20 files")
    refused(zipped(tmp_path / "x.zip", {str(n): b"" for n in range(21)}), "more than 20 files")


def test_a_header_that_would_fill_the_memory_is_refused(tmp_path):
    refused(
        tar(tmp_path / "x.tar.gz", member("a.wav", pax_headers={"comment": "x" * (3 << 20)})),
        "holds a header of 3",
    )


def test_a_negative_size_does_not_lift_the_limit(tmp_path):
    path = tmp_path / "x.tar"
    folder, _ = member("a", b"", type=tarfile.DIRTYPE)
    folder.size = -(10**13)
    bomb, data = member("a/b.wav", b"\0" * 50_000)
    path.write_bytes(
        folder.tobuf(tarfile.GNU_FORMAT)
        + bomb.tobuf(tarfile.GNU_FORMAT)
        + data.ljust(50_176, b"\0")
        + bytes(1024)
    )
    refused(path, "negative size|-10000000000000 bytes", max_bytes=4000)
    path.unlink()
    told_anew, data = member("b.wav", b"\0" * 50_000, pax_headers={"size": "-50000"})
    tar(path, (told_anew, data), mode="w")
    refused(path, "negative|is damaged|bytes", max_bytes=4000)


def test_headers_without_end_are_an_error_and_no_traceback(tmp_path):
    path = tmp_path / "x.tar"
    name, _ = member("././@LongLink", b"", type=tarfile.GNUTYPE_LONGNAME)
    name.size = 4
    path.write_bytes((name.tobuf(tarfile.GNU_FORMAT) + b"abc".ljust(512, b"\0")) * 5000 + bytes(1024))
    refused(path, "is damaged, or no zip or tar")


def test_what_is_wrong_with_the_whole_is_found_before_it_takes_its_place(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "media/good.wav").write_bytes(b"good")

    def check(folder: Path) -> None:
        raise FetchError(f"{(folder / 'a.wav').read_bytes()!r} is not what it should be")

    with pytest.raises(FetchError, match="b'bad' is not what it should be"):
        unpack(tar(tmp_path / "x.tar", member("a.wav", b"bad")), tmp_path / "media", check=check)
    assert tree(tmp_path / "media") == {"good.wav": b"good"}


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_stands_twice_is_refused(tmp_path):
    refused(tar(tmp_path / "x.tar", member("a.wav"), member("./a.wav", b"other")), "stands in it twice")
    refused(tar(tmp_path / "y.tar", member("a"), member("a/b.wav")), "a folder in it, and a file too")
    refused(tar(tmp_path / "z.tar", member("a/b.wav"), member("a")), "stands in it twice")


def test_names_that_differ_in_case_alone_are_two_files_where_the_disk_can_hold_both(tmp_path):
    archive = tar(tmp_path / "x.tar", member("a.wav", b"1"), member("A.wav", b"2"))
    assert tree(unpack(archive, tmp_path / "media")) == {"a.wav": b"1", "A.wav": b"2"}


def test_an_encrypted_zip_is_refused_with_what_to_do(tmp_path):
    archive = zipped(tmp_path / "x.zip", {"a.wav": b"sound"})
    data = bytearray(archive.read_bytes())
    data[6] |= 1  # the flag in the member's own header, and in the directory at the end
    data[data.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(data)
    refused(archive, "is encrypted; unpack it yourself and give --from DIR")


def noise(size: int) -> bytes:
    return bytes((n * n * 7919 + n // 251) % 251 for n in range(size))


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.5, 0.77, 0.99])
def test_an_archive_that_ends_too_soon_is_refused_wherever_it_was_cut(tmp_path, kind, share):
    files = {f"{n}.wav": noise(3000) for n in range(8)}
    archive = tmp_path / f"x.{kind}"
    if kind == "zip":
        zipped(archive, files)
    else:
        tar(archive, *(member(*item) for item in files.items()), mode="w:gz" if kind == "tar.gz" else "w")
    size = archive.stat().st_size if kind != "tar" else 8 * (512 + 3072)  # without the padding at the end
    os.truncate(archive, int(size * share))
    refused(archive, "damaged")


def test_a_tar_cut_between_two_members_is_refused_too(tmp_path):
    archive = tar(tmp_path / "x.tar", *(member(f"{n}.wav", noise(512)) for n in range(8)), mode="w")
    os.truncate(archive, 4 * 1024)
    refused(archive, "before its end mark")


def test_a_damaged_byte_is_found(tmp_path):
    archive = zipped(tmp_path / "x.zip", {"a.wav": noise(50_000)})
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 0xFF
    archive.write_bytes(data)
    refused(archive, "damaged")


@pytest.mark.parametrize("data", [b"", b"<!DOCTYPE html>", b"PK\x03\x04", bytes(300)])
def test_what_is_no_archive_is_refused(tmp_path, data):
    (tmp_path / "x.zip").write_bytes(data)
    refused(tmp_path / "x.zip", "damaged, or no zip or tar")


def test_an_archive_of_nothing_is_refused(tmp_path):
    refused(tar(tmp_path / "x.tar"), "holds no files")
    refused(zipped(tmp_path / "x.zip", {"._a.wav": b""}), "holds no files")


def test_what_was_there_is_replaced_as_a_whole_or_left_alone(tmp_path):
    media = unpack(zipped(tmp_path / "1.zip", {"old.wav": b"1"}), tmp_path / "media")
    with pytest.raises(FetchError):
        unpack(zipped(tmp_path / "2.zip", {"new.wav": b"2", "../x": b""}), media)
    assert tree(media) == {"old.wav": b"1"}
    unpack(zipped(tmp_path / "3.zip", {"new.wav": b"3"}), media)
    assert tree(media) == {"new.wav": b"3"}


def test_killed_in_the_middle_nothing_counts_and_the_next_run_sweeps_it(tmp_path):
    archive = zipped(tmp_path / "x.zip", {f"{n:05d}.wav": b"sound" for n in range(30_000)})
    code = "import sys; from pathlib import Path; from clipmill.fetch.unpack import unpack; unpack(*map(Path, sys.argv[1:]))"
    child = subprocess.Popen([sys.executable, "-c", code, str(archive), str(tmp_path / "media")])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (tmp_path / ".media.unpacking/00100.wav").exists():
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "media").exists()
    unpack(zipped(tmp_path / "y.zip", {"a.wav": b""}), tmp_path / "media")
    assert tree(tmp_path / "media") == {"a.wav": b""}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["media", "x.zip", "y.zip"]
