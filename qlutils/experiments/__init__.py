"""What each notebook computes and concludes: one module a notebook, and what several share."""
