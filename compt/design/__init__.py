"""The search for a chain: which models, how many epochs for each link."""
