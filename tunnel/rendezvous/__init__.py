"""How peers that cannot reach each other yet find each other."""
