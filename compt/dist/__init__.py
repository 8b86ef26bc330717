"""A process among others: its place, rendezvous, collectives, the watch over ranks."""
