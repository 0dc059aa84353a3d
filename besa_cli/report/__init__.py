"""Report of one run or several: one HTML page that needs no network and no script, and its figures as PNG.

`runs.py` and `rows.py` read what is on disk, `figures.py` draws it with matplotlib where that is installed, `page.py`
writes the page.
"""
