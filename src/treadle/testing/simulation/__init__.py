"""A pool in virtual time: the production policy and budget among simulated clients, workers, faults and a log.

What it takes from the product is imported, never copied; what it has of its own is what the product asks of a database,
a worker and a network. docs/simulator.md says what is modelled and what is not. No torch, no threads, no real clock.
Invariant: the same scenario, costs and seed give the same figures, byte for byte.
"""
