"""What an engine is on disk, how it is built and validated, and the lanes that run it."""
