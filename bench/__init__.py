if __name__ != "millpond.bench":
    raise ImportError(f"import millpond.bench, not {__name__}: a second copy would double every class")
