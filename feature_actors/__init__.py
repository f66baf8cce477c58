"""Sources, feature views and the shards that keep their state."""

if __name__ != "millpond.feature_actors":
    raise ImportError(f"import millpond.feature_actors, not {__name__}: a second copy would double every class")
