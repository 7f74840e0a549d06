"""Splitwise (ISCA 2024), sections 5 and 6: latencies, transfers and cluster designs."""
