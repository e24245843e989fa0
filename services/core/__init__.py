"""What all processes share: frames, codec, streams, store, registry, labels, settings, errors, logs."""
