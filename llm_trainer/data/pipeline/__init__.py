"""From documents to token shards in stages that go on where they were killed."""
