"""Merge methods: one file is one method, and the file's name is its name in a recipe."""
