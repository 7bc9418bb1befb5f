"""Pointsman behind Envoy: the endpoint picker over ext_proc, and what it stands on."""
