"""From token shards to batches: sample i is a pure function of the data, the seed and i."""
