"""What treadle says about itself: log events and Prometheus metrics. Never prompts, samples, keys or file contents."""
