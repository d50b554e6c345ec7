"""How each versioned target is made. Recipes return values; they know neither catalog lookups nor the registry."""
