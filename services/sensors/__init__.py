"""Whoever publishes frames: the scene simulator and the replay of recordings."""
