"""What is measured, by hand: scripts, and what they are made of.

A package with this file and not merely a folder, because Opacus installs a top-level package of
the same name, which Python would otherwise prefer.
"""
