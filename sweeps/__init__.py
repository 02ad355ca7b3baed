"""The service: takes a sweep's specification, admits its trials, runs and tracks them.

A sweep's way: `spec` (what is asked), `search_space` (which configurations), `admission` (which
of them the budget allows, under which `guarantee`), `database` (the rows that are the truth),
`tune` (Ray Tune executes), `tracking` (MLflow hears of it), `report` (what there is to see), in
the order that `service` gives them, started from `cli`, or from a notebook by `client`.
`forecast` says beforehand what machines it will take, `home` where state lives, and `user_models`
whose code may be trained.
"""
