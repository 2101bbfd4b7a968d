"""This package cuts a module into pipeline stages: any with a list of blocks that run in order.

`blocks` finds the lists, `trial` finds where cuts are possible (`pieces` by the graphs, `passing`
by the values), `layers` lists what is cut, `stages` makes the stages, and `calling` says how a
module takes its input."""
