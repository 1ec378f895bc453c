"""What a media file's sound is, whatever container it came in: a hash of its coded packets."""

from __future__ import annotations

import hashlib
from pathlib import Path


def content_sha256(path: Path) -> str:
    """The sha256, as hex, of the codec's name and the coded packets of the first audio stream, in order.

    Neither container nor decoder counts, so a copy into another container (WebM to Ogg, MP4
    to Matroska) keeps its hash; an encoding of the same sound in another codec does not. Rate,
    channels and the codec's headers are left out, for containers state them differently. (AAC
    outside of a container, in `.aac` files, has headers within its packets, and another hash.)
    A file that cannot be taken apart is hashed as it is, marked so that it equals no stream.

    Raises:
        OSError: the file cannot be read.
    """
    import av

    av.logging.set_level(av.logging.PANIC)
    digest = hashlib.sha256()
    found = False
    try:
        with open(path, "rb") as file, av.open(file, "r", metadata_errors="ignore") as container:
            for stream in container.streams.audio[:1]:
                digest.update(f"packets {stream.codec_context.codec.canonical_name}\0".encode())
                for packet in container.demux(stream):
                    found = found or packet.size > 0
                    digest.update(packet)
    except (av.FFmpegError, ValueError):
        found = False
    if found:
        return digest.hexdigest()
    with open(path, "rb") as file:
        digest = hashlib.sha256(b"file\0")
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
