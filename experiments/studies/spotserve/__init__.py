"""SpotServe (ASPLOS 2024): latencies and costs on instances that come and go."""
