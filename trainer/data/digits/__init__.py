"""The built-in data set ``digits``: small, real, and on every machine without a download.

`trainer.data.digits.builder` is an ordinary TFDS builder; `trainer.data.digits.preparation` runs
it once per data directory. From then on the data set is read by its name like any other.
"""
