"""Reading, checking, ordering and decoding samples, and the emoji data set."""
