"""Writes a page that explains one comparison of two people's captures."""
