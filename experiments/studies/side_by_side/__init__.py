"""Every system on one cluster, trace and price list."""
