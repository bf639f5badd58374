"""GPU memory through the vendor's driver: handles to share it, strided copies, and the digest. No framework is imported."""
