"""SARATHI (2023) and Sarathi-Serve (OSDI 2024): chunks, bubbles, and capacity under an SLO."""
