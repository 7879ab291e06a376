"""What callers may do and learn: approvals by two people, budgets, disclosure of scores, the right to export templates."""
