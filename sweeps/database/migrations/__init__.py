"""How the sweeps' tables came to be what they are: one module per revision, never edited later."""
