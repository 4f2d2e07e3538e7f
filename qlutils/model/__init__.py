"""Causal language models of every family, as the study sees them: layers, passes, the check at
load."""
