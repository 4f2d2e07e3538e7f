"""Parts of `qlutils.run`, the driver."""
