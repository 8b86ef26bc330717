"""Tables, figures and pages about a run."""
