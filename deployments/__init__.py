"""What answers HTTP: the events app and the score app, and the Ray Serve deployments that hold them."""

if __name__ != "millpond.deployments":
    raise ImportError(f"import millpond.deployments, not {__name__}: a second copy would double every class")
