"""A request becomes an output: refuse, load, encode, denoise, keep, decode, write, report."""
