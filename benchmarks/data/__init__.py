"""Speed and memory of decoders and of whole loaders."""
