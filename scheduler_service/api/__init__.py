"""The gRPC processes: callers' requests in, validated and tokenised; tokens and text out."""
