"""Continuous ICE: finds paths between two peers and keeps them warm; QUIC judges, others choose."""
