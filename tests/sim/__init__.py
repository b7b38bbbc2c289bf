"""Real nodes on a fake clock and a simulated network."""
