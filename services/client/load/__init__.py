"""Load for a running server, as `echosight bench serve` puts it. numpy and the standard library alone."""
