"""Results as one HTML page that opens anywhere: Jinja2 templates, and plots that matplotlib draws."""
