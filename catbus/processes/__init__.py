"""One broker in several processes: a supervisor that forks workers, each of which is a replica."""
