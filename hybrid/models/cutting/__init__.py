"""This package cuts a module into pipeline stages: any with a list of blocks that run in order.

`blocks` finds the lists, `trial` tries where cuts are possible, `stages` makes the stages, `calling`
says how a module takes its input."""
