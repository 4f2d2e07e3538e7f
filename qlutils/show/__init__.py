"""Statistics, tables, figures and HTML; nothing here needs torch."""
