"""What an operator does by hand: one module a noun. They stand on services.core alone."""
