"""Where bytes come from. A source delivers verified bytes into a file; it knows no store and no recipe."""
