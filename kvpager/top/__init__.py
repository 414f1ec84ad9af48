"""What an engine does, on a terminal: `kvpager top`.

recorded  a recording, played or followed ─┐
scraped   the metrics of a running engine ─┴▶ view ─▶ screen
"""
