"""`millpond demo`: real data, end to end, measured."""
