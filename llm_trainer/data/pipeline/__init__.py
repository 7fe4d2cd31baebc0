"""From documents to token shards, in stages that resume after an interruption."""
