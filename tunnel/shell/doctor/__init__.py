"""`martlet doctor`: gathers the facts that `tunnel.doctor` judges."""
