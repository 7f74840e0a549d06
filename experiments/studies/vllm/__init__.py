"""vLLM (SOSP 2023), sections 6 and 7: paging, sharing and preemption against Orca and FasterTransformer."""
