"""The API formats a simulated engine speaks, one file each."""
