"""Files of models: what they say about their own size before anything is loaded, and the generated ones."""
