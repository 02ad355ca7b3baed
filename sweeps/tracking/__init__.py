"""MLflow hears of sweeps here.

`disclosure` lists what is told, `mlflow_writer` tells it (the only module that imports MLflow),
and `outbox` keeps doing so in the background.
"""
