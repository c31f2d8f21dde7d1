"""`grat bench`: what is compared, and how it is measured."""
