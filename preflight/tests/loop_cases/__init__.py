"""Training loops with one silent fault each, and right twins, for `LoopProbe`."""
