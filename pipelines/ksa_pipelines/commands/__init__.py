"""The verbs of `ksa` that make and change data sets. Each imports nothing heavy until it runs."""
