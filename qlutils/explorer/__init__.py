"""One fact at a time, in a notebook."""
