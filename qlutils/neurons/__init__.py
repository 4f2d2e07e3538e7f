"""Sets of knowledge neurons: thresholds, consistency, and other neurons to compare them with."""
