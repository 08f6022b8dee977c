"""The review of a submitted loss, in processes of their own that are thrown away.

process.py is the server's side and imports no torch; child.py is the other side: it confines itself (confine.py) before
it is given anything, traces a file (tracing.py) or runs a graph on made-up tensors (dry_run.py), and answers once.
Invariant: what comes out of a child is data that nobody trusts; the server checks it as if a client had sent it.
"""
