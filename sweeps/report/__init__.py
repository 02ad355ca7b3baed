"""What a sweep has to show.

`results` reads it; `table`, `documents` (JSON), `live` and the utility-privacy picture (`picture`,
`axes`, `figure_png`, `figure_html`) are ways to look at it.
"""
