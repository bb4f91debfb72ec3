"""From sources to split, cleaned rows: nothing here knows a model, and no row changes or goes without being counted."""
