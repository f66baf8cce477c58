if __name__ != "millpond.deployments":
    raise ImportError(f"import millpond.deployments, not {__name__}: a second copy would double every class")
