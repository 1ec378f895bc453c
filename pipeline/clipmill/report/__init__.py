"""Pictures of shards and runs."""
