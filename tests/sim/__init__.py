"""A simulated CUDA driver, on which the real pycuda runs where there is no GPU."""
