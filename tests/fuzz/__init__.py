"""Coverage-guided fuzzing, for whoever wants to look longer than the test suite can."""
