"""The running line: frames in over ZeroMQ, verdicts out to Redis. Never imports torch."""
