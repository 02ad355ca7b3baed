"""Data sets of any shape out of a random number generator, for benchmarks and tests.

`trainer.data.synthetic.request` says what to draw, `trainer.data.synthetic.drawing` draws it, and
`trainer.data.synthetic.preparation` writes it: an ordinary TFDS data set, ``synthetic_<name>``,
with the splits ``train`` and ``test``. The same request gives the same bytes.
"""
