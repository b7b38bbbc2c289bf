"""Real kernels: network namespaces, real devices and real packets."""
