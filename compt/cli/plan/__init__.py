"""`compt plan`."""
