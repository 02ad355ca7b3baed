"""Connections and schemas of the one database, for every room that keeps rows in it.

    engine = connect("sqlite:////home/me/.dp-sweeps/ledger.db")   # or postgresql+psycopg://...
    upgrade(engine, schema)
    with writing(engine) as connection:
        connection.execute(...)

`connection` opens the database and is the only way into a transaction: `writing` or `reading`.
`schema` brings a room's tables to what its code expects; each room has its own revisions and its
own version table, so that two rooms share a database without knowing each other.
"""
