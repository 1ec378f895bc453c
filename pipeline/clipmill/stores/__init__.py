"""Where the bytes of shards lie: a folder of this machine, or a URL; read in stretches, kept in a cache."""

from __future__ import annotations

from clipmill.stores.store import ReadFailure, Store, cache_folder, open_store

__all__ = ["ReadFailure", "Store", "cache_folder", "open_store"]
