"""Files of weights: read shard by shard, written shard by shard."""
