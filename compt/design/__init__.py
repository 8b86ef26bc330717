"""Automatic design of chains: how many epochs a link needs, which models may stand in it, which chain is best."""
