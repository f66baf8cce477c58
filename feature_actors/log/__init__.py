"""The log of a shard: what was acknowledged, on disk. The format is in FORMAT.md."""
