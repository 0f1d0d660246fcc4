"""Recipes: strict YAML in, frozen dataclasses and a deterministic list of members out."""
