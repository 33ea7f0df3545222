"""Figures for whoever watches this host: Prometheus reads them by way of node_exporter's textfile collector."""
