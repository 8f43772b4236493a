"""The embedded default: a procedural world of 64x64 portraits and a tiny Stable Diffusion trained on it."""
