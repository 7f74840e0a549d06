"""DistServe (OSDI 2024), section 6: placements, attainment, and the queueing model behind its idea."""
