"""What runs a model: decoder, weights, engine, studies, command line."""
