"""How a plan reaches workers: a child process, Ray, or a numpy fake. The scheduler sees only `base.Executor`."""
