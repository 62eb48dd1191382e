"""Each operator in plain torch: slow, short, and what the compiled ones are tested against."""
