"""Steps: from units drawn and gradients clipped to new parameters, on one device or many.

`plan` is what all of them follow, `step` the recipe, `resident` and `streamed` the two programs
made of it, and `runners` what drives them.
"""
