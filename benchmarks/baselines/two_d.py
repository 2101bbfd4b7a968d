"""A hand-written loop on DeepSpeed's pipeline in several data-parallel columns under ZeRO-1.

It is `pipeline.py` with another topology and another ZeRO stage, as in DeepSpeed's tutorial.
"""

from .pipeline import make

__all__ = ["make"]
