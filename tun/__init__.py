"""The TUN device: its port, Linux and its in-memory twin, addresses and routes."""
