"""What a run is: schema, presets, TOML and flags to one Run. No torch."""
