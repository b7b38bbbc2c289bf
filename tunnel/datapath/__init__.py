"""IP packets to sealed QUIC packets and back, in batches."""
