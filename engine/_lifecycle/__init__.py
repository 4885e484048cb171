"""The Engine: opening and closing it, which one is ambient, draining, embedding.

Read `engine`, `ambient`, `draining`, `embedding`, `watchdog`.
May import runs and what is below them; it knows neither tasks nor transactions.
"""
