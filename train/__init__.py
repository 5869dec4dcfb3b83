"""From images of good parts to a validated engine. The only package that imports torch."""
