"""Lists, pages and exports of cases, for the people who judge them."""
