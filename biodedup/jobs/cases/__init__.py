"""Open cases for the people who judge them: lists, pages, exports."""
