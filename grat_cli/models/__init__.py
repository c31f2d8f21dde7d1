"""Which model, from where, in which form, on which device."""
