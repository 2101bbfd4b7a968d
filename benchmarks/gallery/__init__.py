"""The parts of `benchmarks.known_failures`: failures, old releases, strategies that show one."""
