"""The command line's operations for notebooks and scripts: tables are pandas, pictures plotly.

    from sweeps.client import Client

    client = Client()                                   # state below DP_SWEEPS_HOME
    client.check("specs/digits.yaml")                   # what it would cost
    results = client.run("specs/digits.yaml")           # waits; `submit` does not
    results.frontier, results.figure()

It decides, records and reads by the same functions as the command line and raises the same
errors. What it starts is driven by a process of its own, which outlives the notebook's kernel.
"""

from sweeps.client.client import Client
from sweeps.client.documents import Check, Results
from sweeps.client.sweep import Sweep

__all__ = ["Check", "Client", "Results", "Sweep"]
