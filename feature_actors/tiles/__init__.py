"""The tile store: the features' state of one shard, in memory that other processes of the node read.

Read `structure` first: it draws the memory.
"""
