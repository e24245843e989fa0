"""The learning: vision and radar encoders, contrast, the endless worker, export. Alone in knowing torch."""
