"""The verbs of `ksa` that the library owns."""
