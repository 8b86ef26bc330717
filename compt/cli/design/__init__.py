"""`compt plan --auto`."""
