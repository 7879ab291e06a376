"""Rules for callers: approvals by two people, budgets, disclosure of scores, the audit log, the right to export templates."""
