"""The migrating peer-to-peer QUIC connection; sans-IO except shell."""
