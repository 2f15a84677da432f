"""Prometheus endpoints."""
