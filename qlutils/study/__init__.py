"""A study's parameters, stored results and notebooks."""
