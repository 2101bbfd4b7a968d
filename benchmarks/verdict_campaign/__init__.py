"""Draws random jobs and plants faults, to count wrong verdicts: parts of benchmarks/verdicts.py.

`draw` decides what is run, `models` and `samples` are what the jobs name, `planted` runs in the
ranks of a faulty run, `campaign` runs and judges, `effect` measures a fault, `page` writes."""
