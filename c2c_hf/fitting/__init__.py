"""Memory fusers in closed form."""
