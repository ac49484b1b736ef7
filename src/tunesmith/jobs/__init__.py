"""Training jobs as the command line runs them."""
