"""The one database.

`tables` and connections, the `states` of sweeps and trials, and `store`, the only place where
rows change.
"""
