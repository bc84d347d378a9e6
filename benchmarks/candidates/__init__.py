"""One process each: ours, and the peers by their public interfaces alone. No file here but ours.py imports deltune."""
