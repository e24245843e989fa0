"""Echosight's workers around the learning: the shared core, ingest, sensors and the command line."""
