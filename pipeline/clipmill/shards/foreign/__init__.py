"""Shards that others made: what they hold, found by one scan."""
