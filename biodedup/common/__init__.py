"""Small helpers for all packages: checks of arguments, forms of results, confidence intervals, deprecated names."""
