"""Sampling: one denoising step, its rows in model calls, what it remembers and what it costs."""
