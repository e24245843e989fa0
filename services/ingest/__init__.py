"""Ingest: read frames from the streams, pair them, store the pairs, acknowledge."""
