"""The protocol of vLLM's engine servers, for gateways that speak it: smg, and Kubernetes' inference extension."""
