"""Report of runs as one HTML page, which needs no network."""
