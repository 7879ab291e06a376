"""Arrow tables of templates: reads and checks them column by column."""
