"""Summary attention over jagged histories: training and prefill, on top of state or from the start."""
