"""How long things take at each endpoint, learned from nothing but its own traffic."""
