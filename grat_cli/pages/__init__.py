"""What people look at: pages that open offline, plots, contact sheets."""
