"""Systems that prefill and decode on different GPUs."""
