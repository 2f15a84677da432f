"""The scheduler's Prometheus endpoint. It lives in the launcher: one port, however many processes there are."""
