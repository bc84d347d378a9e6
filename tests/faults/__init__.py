"""The kill harness: runs that are killed, cut off, filled up, damaged and poisoned must end as if nothing had happened.

`python -m tests.faults` runs all of it and writes the table of docs/reliability.md.
"""
