"""``baton bench``: loads a cluster with requests and measures what callers get."""
