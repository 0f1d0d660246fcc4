"""Leaf networks that ship their code with their repo. Nothing in here imports the rest of hf_zoo."""
