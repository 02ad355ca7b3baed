"""The durable ledger.

`ledger` is the door: `Ledger`. `transaction` holds everything that changes rows, `status` what is
spent and free, `journal` the chain of hashed entries, `witness` the note of its end outside the
database, `verification` the working out of every row anew, `records` the values handed out.
"""
