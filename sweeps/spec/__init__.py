"""What a team asks for: a specification, read and checked.

`yaml_source` reads the text and remembers places, `sweep_spec` says what is allowed, `domains`
what one hyperparameter may be, `splits` which splits may overlap; `reading` joins them, and
`refusals` is how they say no, naming the place and the remedy.
"""
