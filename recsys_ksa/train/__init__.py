"""Training: a config and a data set in, a run directory out."""
