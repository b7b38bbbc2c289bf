"""The migrating QUIC connection; the only room that imports aioquic."""

from tunnel.quic import internals as internals
