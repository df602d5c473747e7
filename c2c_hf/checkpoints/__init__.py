"""Saved fusers and their base models: downloading, loading, comparing, describing."""
