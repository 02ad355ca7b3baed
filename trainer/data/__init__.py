"""Data: where a prepared data set lies, what is said of it, and how its examples are read.

`datasets` opens one; `reading` reads its records by position and `streaming` reads them ahead of
the device; `catalog` lists what is there, `preparing` and `synthetic` make more.
"""
