"""One module, no kernel, no clock."""
