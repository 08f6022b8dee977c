"""The demo: a client of a real server, and the end-to-end proof of the main job.

run.py is the way in; own_server.py starts and stops a server process; quickstart.py talks to it through the SDK.
It imports nothing of the server.
"""
