"""Servers and engines that answer with a fuser: an OpenAI-compatible server, and a connector of vLLM."""
