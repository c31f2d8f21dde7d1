"""What a run will cost before anything is loaded: tokens, operations, memory, time, what fits."""
