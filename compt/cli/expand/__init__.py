"""`compt expand`."""
