"""This package tries a job out on eight samples, in one process, before any run starts.

`run.try_out` returns what it found as `Finding`s: what the model, the loss or the data do that no
strategy can mend, by name. It runs the model a few times forward and once backward, in fp32:

| file | what it looks at |
|---|---|
| `tensors` | parameters and buffers as they are, before anything runs |
| `samples` | what the data set gives: twice the same, finite, of one shape |
| `passes` | the model's outputs: random numbers, neighbours, numbers that are not finite |
| `losses` | the loss: a sum over samples, its count, what it reaches |
| `gradients` | one backward: parameters without a gradient, sparse gradients |

`hybrid.training.check` calls it as a part of every `train`, `compare` and `check`. What is imported
here needs no torch."""

from .finding import SEVERAL, SHARDED, STAGED, Finding

__all__ = ["SEVERAL", "SHARDED", "STAGED", "Finding"]
