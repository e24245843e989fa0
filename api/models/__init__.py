"""A version as it runs: loaded, held to its checkpoint, by what runs it fastest; and which one is live."""
