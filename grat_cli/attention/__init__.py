"""GRAT inside a transformer: token order, schedules of plans, guard, recall, records. Knows no model family."""
