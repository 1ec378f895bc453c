"""Plan, write, index, verify and read shards of clips."""
