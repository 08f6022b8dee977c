"""One file per resource. A route parses the head, authorises, builds the op, enqueues it and answers; nothing else."""
