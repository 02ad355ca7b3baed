"""What a sweep will take of machines, reckoned before it starts: hours, wall time, disk.

    earlier trials of the same shape (`earlier_trials`)  |  a few steps of it here (`calibration`)
                              -> `Measured` -> `reckoning.forecast` -> what the plan will take

A prediction says where it comes from, and says so where there is nothing to go by.
"""
