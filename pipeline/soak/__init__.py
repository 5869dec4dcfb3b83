"""The soak: the real processes under a seeded schedule of faults, judged from a recorded history."""
