"""clipmill: from raw audio collections to GPU-ready shards and trained audio taggers."""

__version__ = "0.1.0"
