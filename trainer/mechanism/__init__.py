"""The parts of the private mechanism: who takes part, which noise is added, and from which keys.

`trainer.training.plan` settles them once for sampler, noise and accounting alike.
"""
