"""Engines: ways to train one module on one device or many."""
