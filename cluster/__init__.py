"""Starting, watching and stopping a cluster, and the `millpond` command."""

if __name__ != "millpond.cluster":
    raise ImportError(f"import millpond.cluster, not {__name__}: a second copy would double every class")
