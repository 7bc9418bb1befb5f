"""The twin: the shipped router against simulated engines, in virtual time."""
