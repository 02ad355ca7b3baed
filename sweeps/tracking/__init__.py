"""MLflow hears of sweeps here, and is asked whether it did.

`disclosure` lists what is told, `mlflow_writer` tells it and `outbox` keeps doing so in the
background; `comparison` reads it back. `mlflow_client` is the only module that imports MLflow.
"""
