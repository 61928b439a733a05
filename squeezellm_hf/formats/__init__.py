"""What lies on disk, as pure functions on tensors: bit-packing and CSR."""
