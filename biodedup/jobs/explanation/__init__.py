"""A page that explains one comparison."""
