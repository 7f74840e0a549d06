"""Melange (arXiv 2404.14527), section 6: the cheapest mixes of GPUs."""
