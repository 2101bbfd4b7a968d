"""ZeRO-1 as a strategy of a user's own, which takes every optimizer: what a refusal prevents."""

from __future__ import annotations

from hybrid.strategies.zero import ZeroStrategy

_zero1 = ZeroStrategy("zero1", "ZeRO-1", 1)
name, summary, modules = "tests.unchecked_zero", "ZeRO-1 without its checks", _zero1.modules
layout, build = _zero1.layout, _zero1.build
