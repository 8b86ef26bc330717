"""From image-text shards to batches: index, order, decoding, captions."""
