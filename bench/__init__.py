"""Speed, side by side: this project, the physical limit, and what a user would otherwise write (docs/performance.md).

`python -m bench` prints one table of ratios (median, least and most of at least five interleaved rounds) and keeps the
raw numbers in bench/results/. Nothing in here asserts on time: a busy machine makes a wide row, not a failure.
"""
