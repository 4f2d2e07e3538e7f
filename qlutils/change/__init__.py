"""Changes of a model: scaled neurons, edited weights, scaled attention columns."""
