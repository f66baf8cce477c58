if __name__ != "millpond.models":
    raise ImportError(f"import millpond.models, not {__name__}: a second copy would double every class")
