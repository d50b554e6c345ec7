"""What is known of assets and who holds them, in SQLite or PostgreSQL."""
