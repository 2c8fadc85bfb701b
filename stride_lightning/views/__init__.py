"""What a person sees: logger dashboards and figures."""
