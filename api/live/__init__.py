"""The classification of what the radars stream."""
