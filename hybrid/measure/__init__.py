"""Instruments: how many bytes of tensors a rank holds (`memory`), what it communicates (`comm`).

Both are started and stopped around whole steps. The loop reads them in steps that it does not time.
"""
