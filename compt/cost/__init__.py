"""What models and their training cost: parameters, multiply-accumulates (MACs), bytes, seconds on a GPU."""
