"""Sources of energy readings; each file is one meter."""
