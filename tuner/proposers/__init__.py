"""Ways of choosing the next configuration; each file is one way."""
