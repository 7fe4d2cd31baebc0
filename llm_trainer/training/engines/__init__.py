"""How a step runs: replicas and shards, pipeline stages, DeepSpeed; precision and compilation."""
