"""What only benchmarks, the demo and tests use; nothing else in the package imports it.

Timing of steps, attention, the store and conversion; process groups that share a GPU; the demo's target.
"""
