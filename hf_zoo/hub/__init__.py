"""Everything between a population and a Hub: publishing, cards, and a Hub server for one machine.

This package imports nothing by itself; `hf_zoo.hub.local` needs the standard library and PyYAML only.
"""
