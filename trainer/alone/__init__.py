"""One trial as a program: ``python -m trainer CONFIG.yaml``, for one person and one machine.

    trial_file -> resolution                   what the person wrote becomes a `TrialConfig`
    run_directory, charges                     what a run leaves behind, and its own ledger
    command -> trainer.loop -> progress        the run, and what is seen of it
    statement                                  what is promised, in words
    interrupts, hosts                          stopping well; several machines

Nothing here is imported by the rest of the package.
"""
