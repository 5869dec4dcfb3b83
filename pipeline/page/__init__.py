"""The monitor page: what the line does, in a browser. It reads Redis alone, so it can run anywhere."""
