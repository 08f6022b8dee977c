"""The one mind of a pool: it reads queued rows, decides what runs when, and commits what came of it.

It meets the gateway only in the store, and workers only through executor.base.Executor.
"""
